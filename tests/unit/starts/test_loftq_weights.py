"""PEFT's functions that start an adapter again: fitting one to what quantizing a whole model lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from lorafa.backends.int8 import Int8Linear
from lorafa.backends.nf4 import NF4Linear
from lorafa.backends.quantized import QuantizedLinear
from lorafa.errors import AdapterError, CheckpointError, ConfigError, LoraError, SourceError, TargetError
from toys import compare
from toys.adapters import train
from toys.compare import assert_unchanged, everything

QUANTIZED = ("body.first", "body.second")


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48), nn.Linear(48, 80, bias=False)


class Model(nn.Module):
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = Body(), nn.Linear(80, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body.second(torch.tanh(self.body.first(x))))
        return y


X = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))


def quantized(kind: type[QuantizedLinear] = NF4Linear) -> Model:
    model = Model()
    model.body.first, model.body.second = (kind.from_linear(m) for m in (model.body.first, model.body.second))
    return model


def adapted(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    values = {"target_modules": ["first", "second", "head"], "r": 6, "lora_alpha": 15, "init_seed": 0} | settings
    return get_peft_model(quantized() if model is None else model, LoraConfig(**values)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(Model().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def errors(model: PeftModel) -> dict[str, Tensor]:
    """||W - Q - s B A||_F of the quantized layers."""
    dense, base = Model(), model.get_base_model()
    found = {}
    for name in QUANTIZED:
        layer = base.get_submodule(name)
        weight = layer.base_weight() + layer.adapters["default"].product()
        found[name] = torch.linalg.matrix_norm(dense.get_submodule(name).weight - weight).detach()
    return found


@pytest.mark.parametrize("kind", [NF4Linear, Int8Linear])
@pytest.mark.parametrize("scaling", [{"lora_alpha": 15}, {"use_rslora": True}])
def test_the_adapter_starts_at_the_best_it_can_do_for_what_was_lost(
    kind: type[QuantizedLinear], scaling: dict[str, Any], folder: Path
) -> None:
    model = adapted(quantized(kind), **scaling)
    head = model.get_base_model().head.factor_A("default").clone()
    codes = model.get_base_model().body.first.base_layer.codes.clone()
    before = (model(X) - Model()(X)).norm()
    assert replace_lora_weights_loftq(model, folder) is None
    for name, error in errors(model).items():
        lost = Model().get_submodule(name).weight - model.get_base_model().get_submodule(name).base_weight()
        tail = torch.linalg.svdvals(lost)[6:].square().sum().sqrt()
        torch.testing.assert_close(error, tail, rtol=1e-5, atol=0)
    assert (model(X) - Model()(X)).norm() < 0.95 * before
    assert torch.equal(model.get_base_model().head.factor_A("default"), head)  # it lost nothing
    assert torch.equal(model.get_base_model().body.first.base_layer.codes, codes)


def whole(folder: Path) -> Path:
    return folder / "model.safetensors"


def another_name(folder: Path) -> Path:
    return whole(folder).rename(folder / "weights.safetensors")


def sharded(folder: Path) -> Path:
    state = Model().state_dict()
    whole(folder).unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: value for name, value in state.items() if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def index(folder: Path) -> Path:
    return sharded(folder) / "model.safetensors.index.json"


def of_the_bare_model(folder: Path) -> Path:
    save_file(Model().body.state_dict(), whole(folder))
    return folder


def in_bfloat16(folder: Path) -> Path:
    save_file({name: value.bfloat16() for name, value in Model().state_dict().items()}, whole(folder))
    return folder


@pytest.mark.parametrize("made", [str, whole, another_name, sharded, index, of_the_bare_model, in_bfloat16])
def test_weights_are_found_in_every_way_a_model_is_stored(made: Callable[[Path], str | Path], folder: Path) -> None:
    model = adapted()
    before = errors(model)
    replace_lora_weights_loftq(model, made(folder))
    assert all(error < 0.95 * before[name] for name, error in errors(model).items())


def test_without_a_path_the_model_says_where_it_came_from(folder: Path) -> None:
    model = adapted()
    with pytest.raises(SourceError, match=r"The Model does not say where its weights came from\. Pass model_path="):
        replace_lora_weights_loftq(model)
    model.get_base_model().name_or_path = str(folder)
    before = errors(model)
    replace_lora_weights_loftq(model)
    assert all(error < before[name] for name, error in errors(model).items())


def test_rejected_layers_get_their_values_back_and_accepted_ones_are_seen_by_those_after_them(folder: Path) -> None:
    model = adapted()
    train(model)
    dense, seen, before = Model()(X), [], errors(model)
    rejected = model.get_base_model().body.second.adapters["default"]
    A = rejected.A.clone()

    def accept(given: PeftModel, name: str) -> bool:
        assert given is model
        seen.append((name, (given(X) - dense).norm()))
        return name == "body.first"

    replace_lora_weights_loftq(model, folder, callback=accept)
    assert [name for name, _ in seen] == list(QUANTIZED)
    assert seen[1][1] < seen[0][1]
    assert errors(model)["body.first"] < before["body.first"]
    assert torch.equal(errors(model)["body.second"], before["body.second"])
    assert torch.equal(rejected.A, A)


def test_another_adapter_is_fitted_by_name_and_the_factors_stay_the_parameters_they_were(folder: Path) -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"], lora_alpha=3))
    before = everything(model)
    replace_lora_weights_loftq(model, folder, "second")
    after = everything(model)
    changed = {key for key in before["values"] if not torch.equal(before["values"][key], after["values"][key])}
    assert changed == {f"base_model.model.body.first.lora_{factor}.second.weight" for factor in "AB"}
    assert before["objects"] == after["objects"]
    assert before["trains"] == after["trains"]


def test_an_adapter_fitted_so_is_saved_as_plain_lora(folder: Path) -> None:
    model = adapted()
    replace_lora_weights_loftq(model, folder)
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(quantized(), folder / "adapter")
    assert torch.equal(loaded(X), model(X))


# ---- errors change nothing


def refused(model: nn.Module, kind: type[LoraError], text: str, *args: Any, **kwargs: Any) -> None:
    with compare.refused(model, kind, text):
        replace_lora_weights_loftq(model, *args, **kwargs)  # type: ignore[arg-type]


def test_models_without_what_is_needed_are_refused(folder: Path) -> None:
    refused(Model(), AdapterError, "takes a PeftModel, found Model. Put an adapter on the quantized model", folder)
    refused(adapted(), AdapterError, "The model has no adapter 'other'", folder, "other")
    text = "Adapter 'default' is on no quantized linear layer, .* or make the adapter with init_lora_weights='loftq'"
    refused(adapted(Model()), TargetError, text, folder)
    merged = adapted()
    merged.merge_adapter()
    refused(merged, AdapterError, r"'default' is merged .* before fitting it to what quantizing lost", folder)
    dora = r"body\.first: adapter 'default' is no plain LoRA, .* it has dora\. Make it anew"
    refused(adapted(use_dora=True), AdapterError, dora, folder)
    moved = "it has a start that was taken from the base"
    refused(adapted(init_lora_weights="pissa"), AdapterError, moved, folder)
    rank = adapted(r=50, target_modules=["first"])
    refused(rank, ConfigError, r"body\.first: rank 50 is larger than min\(out, in\) = 48", folder)


def stored(folder: Path, **changes: Tensor | None) -> Path:
    state = Model().state_dict() | {f"body.{name}.weight": value for name, value in changes.items()}
    save_file({name: value for name, value in state.items() if value is not None}, whole(folder))
    return folder


def test_files_that_do_not_fit_are_refused(folder: Path) -> None:
    model = adapted()
    refused(model, SourceError, r"There is no folder .*nowhere", folder / "nowhere" / "at" / "all")
    (folder / "empty").mkdir()
    refused(model, SourceError, r"has no model\.safetensors and no model\.safetensors\.index\.json", folder / "empty")
    text = r"has no tensor 'body\.second\.weight'\. Did you mean .* Name the weights of the model that was quantized"
    refused(model, CheckpointError, text, stored(folder, second=None))
    text = r"has body\.second\.weight as 80x47, the model as 80x48\. Name the weights"
    refused(model, CheckpointError, text, stored(folder, second=torch.zeros(80, 47)))
    text = r"body\.second\.weight is not what the layer was quantized from; it differs from the codes by more than 50%"
    refused(model, CheckpointError, text, stored(folder, second=torch.randn(80, 48)))
    for value in (float("nan"), float("inf")):
        weight = Model().body.second.weight.detach().clone()
        weight[3, 5] = value
        text = r"model\.safetensors: body\.second\.weight holds nan or inf, .* Nothing was changed"
        refused(model, CheckpointError, text, stored(folder, second=weight))
    whole(folder).write_bytes(b"nothing of the kind")
    refused(model, CheckpointError, r"model\.safetensors is no safetensors file, or is damaged", folder)


def test_a_scaling_that_no_finite_factors_go_with_is_refused(folder: Path) -> None:
    model = adapted()
    model.get_base_model().body.second.set_scale("default", 0.0)
    refused(model, AdapterError, r"body\.second: adapter 'default' has scaling 0.*Set another one", folder)
    model.get_base_model().body.second.set_scale("default", 1e-90)
    text = r"the factors fitted for adapter 'default' are too large for torch\.float32.* scaling is .*e-90"
    refused(model, AdapterError, text, folder)


def test_a_sharded_model_that_is_not_whole_is_refused(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(adapted(), SourceError, "names 'model-00002-of-00002.safetensors', which is not in its folder", folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(adapted(), CheckpointError, "has no 'weight_map', which says which file holds what", folder)


def test_a_callback_that_fails_leaves_everything_as_it_was(folder: Path) -> None:
    model = adapted()
    train(model)
    before = everything(model)

    def fail(given: PeftModel, name: str) -> bool:
        if name == "body.second":
            raise KeyError("mine")
        return True

    with pytest.raises(KeyError, match="mine"):
        replace_lora_weights_loftq(model, folder, callback=fail)
    assert_unchanged(before, model)
