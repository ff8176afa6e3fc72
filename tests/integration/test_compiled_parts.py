"""A model of which a part was compiled, before or after the adapter: names, files and statistics are the usual ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import (
    LoraConfig,
    PeftModel,
    collect_statistics,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from lorafa.io.find import WEIGHTS_NAME
from lorafa.surgery.resolve import resolve


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.q_proj(h)) * self.v_proj(h)


class Model(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        y: Tensor = self.head(h)
        return y


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def linears(model: Model) -> Model:
    for block in model.layers:
        block.q_proj, block.v_proj = compiled(block.q_proj), compiled(block.v_proj)
    return model


def blocks(model: Model) -> Model:
    for i, block in enumerate(model.layers):
        model.layers[i] = compiled(block)
    return model


def ends(model: Model) -> Model:
    model.embed, model.head = compiled(model.embed), compiled(model.head)
    return model


def everything(model: Model) -> nn.Module:
    return compiled(blocks(ends(linears(model))))


PARTS: dict[str, Callable[[Model], nn.Module]] = {
    "the whole model": compiled,
    "every block": blocks,
    "every linear layer": linears,
    "embedding and head": ends,
    "everything": everything,
}
CONFIGS = {
    "linear": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "full name": {"target_modules": ["layers.1.v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "rank_pattern": {"layers.0.q_proj": 3}},
    "embedding": {"target_modules": ["embed", "layers.0.q_proj"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["layers.1.norm", "head"]},
    "saved block": {"target_modules": ["layers.0.v_proj"], "modules_to_save": ["layers.1"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 4]},
    "experts": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
X = torch.arange(12).view(2, 6) % 11


def config(name: str = "linear") -> LoraConfig:
    return LoraConfig(r=2, init_seed=0, **CONFIGS[name])  # type: ignore[arg-type]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, msg=key)


def filled(part: str | None, settings: str) -> PeftModel:
    """An adapted model whose adapter has random values, made without running the model: running compiles it."""
    model = get_peft_model(Model() if part is None else PARTS[part](Model()), config(settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


CASES = [*(("everything", settings) for settings in CONFIGS), *((part, "linear") for part in PARTS)]


@pytest.mark.parametrize(("part", "settings"), dict.fromkeys(CASES))
def test_a_file_of_a_compiled_model_is_that_of_the_model_that_is_not(part: str, settings: str, tmp_path: Path) -> None:
    plain, model = filled(None, settings), filled(part, settings)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "compiled")
    assert_equal(*(load_file(tmp_path / folder / WEIGHTS_NAME) for folder in ("plain", "compiled")))
    plain_config, config = (tmp_path / folder / "adapter_config.json" for folder in ("plain", "compiled"))
    assert plain_config.read_text() == config.read_text()
    expected = get_peft_model_state_dict(plain)
    for base, folder in ((Model(), "compiled"), (PARTS[part](Model()), "plain")):
        assert_equal(get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path / folder)), expected)


@pytest.mark.parametrize("part", PARTS)
def test_the_adapter_counts_in_a_part_that_has_run_compiled_before(part: str) -> None:
    model, targets = PARTS[part](Model()), ["embed", "q_proj", "v_proj", "head"]
    base = model(X)
    wrapped = get_peft_model(model, LoraConfig(r=2, init_seed=0, target_modules=targets, init_lora_weights=False))
    twin = get_peft_model(Model(), LoraConfig(r=2, init_seed=0, target_modules=targets, init_lora_weights=False))
    y, expected = wrapped(X), twin(X)
    assert (y - base).abs().max() > 0.01
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    theirs = [p.grad for p in twin.parameters() if p.requires_grad]
    for p, grad in zip((p for p in wrapped.parameters() if p.requires_grad), theirs, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(X), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", ["linear", "saved", "pissa", "experts"])
def test_unloading_leaves_what_was_compiled_compiled_and_running_the_base(settings: str) -> None:
    plain, model = filled(None, settings), filled("everything", settings)
    names = [name for name, _ in everything(Model()).named_modules()]
    merged = copy.deepcopy(plain).merge_and_unload()
    torch.testing.assert_close(model.merge_and_unload()(X), merged(X), rtol=1e-5, atol=1e-5)
    base = filled("everything", settings).unload()
    assert [name for name, _ in base.named_modules()] == names
    torch.testing.assert_close(base(X), plain.unload()(X), rtol=1e-5, atol=1e-5)


def test_a_failed_call_leaves_the_compiled_parts_as_they_were() -> None:
    model = linears(Model())
    before = {name: id(module) for name, module in model.named_modules()}
    y = model(X)
    wrapped = get_peft_model(model, config())
    taken = wrapped.base_model.plan_adapter(resolve(wrapped.get_base_model(), config("saved")), "other")
    wrapped.base_model.apply_plan(taken)()
    assert list(wrapped.peft_config) == ["default"]
    wrapped.unload()
    torch.testing.assert_close(model(X), y)
    fresh = linears(Model())
    with pytest.raises(ValueError, match="'haed' matches no module"):
        get_peft_model(fresh, LoraConfig(target_modules=["q_proj"], modules_to_save=["haed"]))
    assert [name for name, _ in fresh.named_modules()] == list(before)


def test_what_is_compiled_after_the_adapter_has_the_usual_names_in_files_and_reports(tmp_path: Path) -> None:
    plain = filled(None, "saved")
    expected = get_peft_model_state_dict(plain)
    model = filled(None, "saved")
    names = [status.name for status in get_layer_status(model)]
    inner = model.base_model.model
    inner.layers[0].v_proj, inner.layers[1] = compiled(inner.layers[0].v_proj), compiled(inner.layers[1])
    inner.head = compiled(inner.head)
    whole = compiled(model)
    assert [status.name for status in get_layer_status(model)] == names
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    assert load_file(tmp_path / WEIGHTS_NAME).keys() == expected.keys()
    state = whole.state_dict()
    assert any("_orig_mod" in key for key in state)
    whole.save_pretrained(tmp_path / "gathered", state_dict=state)  # type: ignore[operator]
    unwrapped = get_peft_model_state_dict(whole, unwrap_compiled=True)
    gathered = load_file(tmp_path / "gathered" / WEIGHTS_NAME)
    for found in (get_peft_model_state_dict(whole), get_peft_model_state_dict(whole, state), unwrapped, gathered):
        assert_equal(found, expected)
    torch.testing.assert_close(whole(X), plain(X), rtol=1e-5, atol=1e-5)


def test_keys_with_the_compilers_wrapper_in_them_are_read(tmp_path: Path) -> None:
    model = filled(None, "linear")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    as_written = {f"_orig_mod.{key.replace('layers.', 'layers._orig_mod.')}": tensors[key] for key in tensors}
    save_file(as_written, tmp_path / WEIGHTS_NAME)
    torch.testing.assert_close(PeftModel.from_pretrained(Model(), tmp_path)(X), model(X), rtol=0, atol=0)
    other = get_peft_model(Model(), config()).eval()
    set_peft_model_state_dict(other, as_written)
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)


def test_injected_into_a_compiled_model_the_adapter_has_the_usual_names() -> None:
    plain, model = (inject_adapter_in_model(config(), make) for make in (Model(), blocks(Model())))
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(plain).keys()


@pytest.mark.parametrize("part", ["the whole model", "everything"])
def test_statistics_of_a_model_that_has_run_compiled_are_those_of_the_model_that_is_not(part: str) -> None:
    batches = [X, (X + 5) % 11]
    asked = LoraConfig(r=2, init_seed=0, target_modules=["q_proj", "layers.1.v_proj"], init_lora_weights="lora_one")
    model = PARTS[part](Model()).eval()
    model(X).square().mean().backward()
    model.zero_grad()

    def loss(run: nn.Module, x: Tensor) -> Tensor:
        return run(x).square().mean()  # type: ignore[no-any-return]

    plain, found = (collect_statistics(one, asked, batches, loss=loss) for one in (Model(), model))
    assert list(found) == list(plain)
    assert found.about["base"] == plain.about["base"]
    for layer in plain:
        torch.testing.assert_close(found[layer]["gradient.S"], plain[layer]["gradient.S"], rtol=1e-4, atol=1e-6)
    get_peft_model(Model(), asked, stats=found)


def test_a_compiled_model_with_an_adapter_is_known_for_one() -> None:
    with pytest.raises(ValueError, match="is a PeftModel already"):
        get_peft_model(compiled(filled(None, "linear")), config())
