"""`from_teacher` in the library: the teacher is read from its files, layer by layer, and found to fit before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, collect_statistics, get_peft_model, initialize
from lorafa.backends.int8 import Int8Linear
from lorafa.calibration.gradient import metric_root
from lorafa.errors import BackendError, CheckpointError, ConfigError, SourceError
from lorafa.storage import model_files
from toys.adapters import train
from toys.calibration import Toy, inputs
from toys.calibration import config as toy_config
from toys.compare import close, refused
from toys.language_models import adapted, gpt2, llama

TARGETS = ["q_proj", "down_proj"]
BATCHES = [{"input_ids": torch.randint(0, 32, (2, 20), generator=torch.Generator().manual_seed(i))} for i in range(4)]


def config(teacher: Path | str | None, targets: list[str] | None = None, r: int = 4, **own: Any) -> LoraConfig:
    return LoraConfig(
        r=r, lora_alpha=6, target_modules=targets or TARGETS, init_seed=0, init_lora_weights="from_teacher",
        init_config={"teacher": None if teacher is None else str(teacher)} | own,
    )  # fmt: skip


def tuned(model: nn.Module, rank: int | None = 2, only: str = "proj") -> Any:
    """A copy in which the matrices of some layers have changed, by so many directions."""
    made = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if only in name and p.dim() == 2:
                within = min(p.shape) if rank is None else rank
                p.add_(0.05 * (torch.randn(len(p), within) @ torch.randn(within, p.shape[1])).to(p))
    return made


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def deltas(model: PeftModel) -> dict[str, Tensor]:
    return {path: layer.get_delta_weight("default") for path, layer in model.base_model.lora_layers()}


def changes(model: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    theirs = dict(teacher.named_parameters())
    return {name: theirs[name] - p for name, p in model.named_parameters()}


@pytest.mark.parametrize("shards", [None, "5KB"])
def test_a_change_of_few_directions_is_the_adapter_at_step_0(shards: str | None, tmp_path: Path) -> None:
    model = llama().double()
    teacher = tuned(model)
    folder = saved(teacher, tmp_path / "teacher", **({} if shards is None else {"max_shard_size": shards}))
    assert len(list(folder.glob("*.safetensors"))) == (1 if shards is None else len(list(folder.glob("model-*"))))
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = changes(model, teacher)
    started = initialize(model, config(folder), BATCHES)
    for path, delta in deltas(started).items():
        close(delta, wanted[f"{path}.weight"], 1e-6)  # of the layers, factors are float32
    base = {name.replace(".base_layer", ""): p for name, p in started.get_base_model().named_parameters()}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    assert not any(layer.fallbacks for _, layer in started.base_model.lora_layers())


def test_of_a_change_of_many_directions_the_best_copy_on_the_data_is_taken(tmp_path: Path) -> None:
    model = llama().double()
    teacher = tuned(model, None)
    stats = collect_statistics(model, config(saved(teacher, tmp_path / "teacher"), r=2), BATCHES)
    wanted = changes(model, teacher)
    started = get_peft_model(model, config(None, r=2), stats=stats)
    for path, delta in deltas(started).items():
        D, root = wanted[f"{path}.weight"], metric_root(stats[path]["second_moment.C"])
        values = torch.linalg.svdvals(D @ root)
        close(stats[path]["teacher_change.S"], values[:8], 1e-6)
        close(torch.linalg.matrix_norm((D - delta) @ root), values[2:].square().sum().sqrt(), 1e-5)
        close(stats[path]["teacher_change.norm2"], values.square().sum(), 1e-6)


def test_the_left_half_leaves_the_function_as_it_is(tmp_path: Path) -> None:
    model = llama().double().eval()
    plain = model(**BATCHES[0]).logits
    folder = saved(tuned(model, None), tmp_path / "teacher")
    started = initialize(model, config(folder, part="left"), BATCHES).eval()
    torch.testing.assert_close(started(**BATCHES[0]).logits, plain, rtol=0, atol=0)
    assert all(layer.factor_B("default").any() for _, layer in started.base_model.lora_layers())


def test_weights_that_are_kept_the_other_way_round_are_copied_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2().double()
    teacher = tuned(model, only="c_attn.weight")
    wanted = changes(model, teacher)
    with pytest.warns(UserWarning, match=r"on 2 of 4 layers|nothing to start from"):
        started = initialize(model, config(saved(teacher, tmp_path / "t"), ["c_attn", "c_fc"]), BATCHES)
    layers = dict(started.base_model.lora_layers())
    for path, delta in deltas(started).items():
        if path.endswith("c_attn"):
            close(delta, wanted[f"{path}.weight"], 1e-6)
        else:  # the teacher's is the model's own
            assert layers[path].fallbacks["default"] == "its teacher has the same weight"
            assert not delta.any()


def test_of_a_quantized_base_the_change_is_that_of_the_weight_it_stands_for(tmp_path: Path) -> None:
    model = llama()
    folder, codes = saved(tuned(model), tmp_path / "teacher"), {}
    for number, block in enumerate(model.model.layers):
        block.self_attn.q_proj = Int8Linear(block.self_attn.q_proj.weight.detach())
        codes[f"model.layers.{number}.self_attn.q_proj"] = block.self_attn.q_proj.dequantize()
    theirs = dict(tuned(llama()).named_parameters())
    started = initialize(model, config(folder, ["q_proj"], r=16), BATCHES)
    for path, delta in deltas(started).items():
        close(codes[path] + delta, theirs[f"{path}.weight"], 1e-4)


def test_one_weight_of_the_teacher_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    folder, read = saved(tuned(model), tmp_path / "teacher"), []
    own = model_files.Stored.read

    def noted(self: Any) -> Tensor:
        read.append(self.name)
        return own(self)

    monkeypatch.setattr(model_files.Stored, "read", noted)
    initialize(model, config(folder), BATCHES)
    assert sorted(read) == sorted(name for name in dict(llama().named_parameters()) if any(t in name for t in TARGETS))


def test_an_adapter_on_the_same_base_is_a_teacher(tmp_path: Path) -> None:
    model = llama().double()
    teacher = adapted(llama().double(), r=3, target_modules=["q_proj", "v_proj"])
    train(teacher, 0.2)
    teacher.save_pretrained(tmp_path / "adapter")
    wanted = deltas(teacher)
    with pytest.warns(UserWarning, match="nothing to start from"):
        started = initialize(model, config(tmp_path / "adapter"), BATCHES)
    found = deltas(started)
    for path, delta in found.items():
        if path in wanted:
            close(delta, wanted[path], 1e-5)
        else:
            assert not delta.any()
    assert any(path in wanted for path in found)


def test_a_model_with_adapters_gets_another_from_its_teacher(tmp_path: Path) -> None:
    base = llama().double()
    teacher = tuned(base)
    wanted, folder = changes(base, teacher), saved(teacher, tmp_path / "teacher")
    model = adapted(base, target_modules=TARGETS)
    train(model, 0.3)
    stats = collect_statistics(model, config(folder), BATCHES)
    model.add_adapter("second", config(folder), stats=stats)
    for path, layer in model.base_model.lora_layers():
        close(layer.get_delta_weight("second"), wanted[f"{path}.weight"], 1e-6)


# ---- what is refused


def test_teachers_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    model = llama()
    for name, options, kind, text in (
        ("wide", {"intermediate_size": 40}, ConfigError,
         r"has model\.layers\.0\.mlp\.down_proj\.weight of shape \(16, 40\), and the model \(16, 24\): 2 of 4 layers"),
        ("deep", {"num_hidden_layers": 3}, ConfigError,
         r"has layers that the model has not: model\.layers\.2\.\S+.*beside the training: align=external"),
        ("flat", {"num_hidden_layers": 1}, CheckpointError,
         r"has no model\.layers\.1\.\S+, .*which the adapter is put on\. Take a copy of this very model"),
    ):  # fmt: skip
        folder = saved(llama(**options), tmp_path / name)
        with refused(model, kind, text):
            initialize(model, config(folder), BATCHES)


def test_teachers_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model = llama()
    with refused(model, ConfigError, "A start from a teacher needs one. Pass init_config={'teacher': ...}"):
        initialize(model, config(None), BATCHES)
    with refused(model, SourceError, "nowhere"):
        initialize(model, config(tmp_path / "nowhere"), BATCHES)
    quantized = saved(llama(), tmp_path / "quantized")
    values = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (quantized / "config.json").write_text(json.dumps(values))
    with refused(model, BackendError, r"is quantized \(gptq\)"):
        initialize(model, config(quantized), BATCHES)
    toy = Toy()
    own = {"init_config": {"teacher": str(saved(llama(), tmp_path / "model"))}}
    with refused(toy, BackendError, "as a model of transformers has them, and this is Toy. Collect the"):
        collect_statistics(toy, toy_config("from_teacher", **own), inputs(), loss=lambda m, x: m(x).mean())


def test_adapters_that_are_no_teacher_are_refused(tmp_path: Path) -> None:
    model = llama()
    for name, settings, base, kind, text in (
        ("dora", {"use_dora": True}, llama(), ConfigError, "cannot be read layer by layer: its formula, dora, is a"),
        ("other", {}, tuned(llama()), CheckpointError, "was made for another base model: 2 of 2 of its layers have"),
        ("elsewhere", {"target_modules": ["v_proj"]}, llama(), ConfigError, "and on no layer that this one is put on"),
        ("wide", {"target_modules": ["down_proj"]}, llama(intermediate_size=40), CheckpointError, "another base model"),
    ):
        teacher = adapted(base, **{"target_modules": ["q_proj"]} | settings)
        teacher.save_pretrained(tmp_path / name)
        with refused(model, kind, text):
            initialize(model, config(tmp_path / name), BATCHES)


def test_an_adapter_of_another_shape_whose_base_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher = adapted(llama(intermediate_size=40), target_modules=["down_proj"])
    teacher.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without the header that says what base it was made for
    text = r"changes model\.layers\.0\.mlp\.down_proj in the shape \(16, 40\), and the model has \(16, 24\) there"
    with refused(model := llama(), ConfigError, text):
        initialize(model, config(tmp_path / "adapter"), BATCHES)


def test_a_cache_is_of_one_state_of_the_teacher(tmp_path: Path) -> None:
    model, cache = llama(), tmp_path / "stats.safetensors"
    folder = saved(tuned(model, 1), tmp_path / "teacher")
    first = collect_statistics(model, config(folder), BATCHES, cache=cache)
    again = collect_statistics(model, config(folder), BATCHES, cache=cache)
    assert first.about["key"] == again.about["key"]
    saved(tuned(model, 3), folder)
    other = collect_statistics(model, config(folder), BATCHES, cache=cache)
    layer = next(iter(first))
    assert not torch.equal(first[layer]["teacher_change.S"], other[layer]["teacher_change.S"])
