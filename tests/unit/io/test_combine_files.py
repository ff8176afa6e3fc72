"""Adapters on disk combined without their base: the same as in a model that has them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError
from lorafa.io.combine_files import combine_files, combine_on_base, why_base
from lorafa.surgery.combining import COMBINATIONS, Combining
from toys.adapters import VARIANT, with_starts
from toys.combined import deltas, density_for, distance, several, two_on, weighted
from toys.compare import assert_same_tensors, close
from toys.language_models import llama
from toys.models import Attention, Convolution, Linears, Lookup, Mixture
from toys.parity import trained

LINEAR = "torch.nn.modules.linear.Linear"
WEIGHTS = {"a": 0.7, "b": -1.3}
ON = {"r": 3, "target_modules": ["first", "second"]}
FILE = "adapter_model.safetensors"


def saved(base: nn.Module, folder: Path, **configs: LoraConfig) -> PeftModel:
    model = several(base, **configs)
    model.save_pretrained(folder)
    return model


def read(base: nn.Module, *folders: Path) -> PeftModel:
    """The base with the adapters of folders, called as they are."""
    first, *others = folders
    model = PeftModel.from_pretrained(base, first, first.name)
    for folder in others:
        model.load_adapter(folder, folder.name)
    return model.eval()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def both(folder: Path) -> list[Path]:
    return [folder / "a", folder / "b"]


# ---- right


PRODUCTS = [(v, LINEAR) for v in VARIANT if "dora" not in v]


@pytest.mark.parametrize(("variant", "kind", "start"), with_starts(PRODUCTS, True, "pissa"))
def test_every_formula_that_is_a_product(variant: str, kind: str, start: bool | str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = two_on(kind, **VARIANT[variant] | {"init_lora_weights": start})
    model.save_pretrained(tmp_path)
    folders = [tmp_path, tmp_path / "other"]
    combine_files(folders, [0.7, -1.3], tmp_path / "sum", Combining("cat"))
    model.load_adapter(tmp_path / "sum", "sum")
    assert distance(deltas(model, "sum"), weighted(model, {"default": 0.7, "other": -1.3})) < 1e-12


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "bias": (Linears, [ON | {"lora_bias": True, "lora_alpha": 5}, ON]),
    "patterns": (Linears, [ON | {"rank_pattern": {"first": 5}, "alpha_pattern": {"second": 9}}, ON]),
    "union": (Linears, [{"target_modules": ["first"]}, {"target_modules": "second|head", "r": 4}]),
    "embedding": (Lookup, [{"target_modules": ["table", "head"], "r": 3}, {"target_modules": ["table"], "r": 2}]),
    "conv": (lambda: Convolution(2), [{"target_modules": ["conv"], "r": 3}, {"target_modules": ["conv", "head"]}]),
    "grouped conv": (
        lambda: Convolution(1, groups=2), [{"target_modules": ["conv"], "r": 4}, {"target_modules": ["conv"], "r": 2}]
    ),
    "attention": (
        Attention,
        [{"target_modules": ["attention"]}, {"target_modules": ["attention"], "attention_out_proj_twice": True}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["cat", "svd", "dare_ties_svd"])
@pytest.mark.parametrize("layers", LAYERS)
def test_every_layer_as_in_a_model_with_the_same_adapters(layers: str, kind: str, tmp_path: Path) -> None:
    make, settings = LAYERS[layers]
    torch.manual_seed(0)
    base = make().double()
    configs = {name: LoraConfig(**one) for name, one in zip("ab", settings, strict=True)}
    saved(copy.deepcopy(base), tmp_path, **configs)
    asked = Combining(kind, seed=3, **density_for(kind))
    report = combine_files(both(tmp_path), [0.7, -1.3], tmp_path / "sum", asked)
    on_base = combine_on_base(copy.deepcopy(base), both(tmp_path), [0.7, -1.3], tmp_path / "on_base", asked)
    for name, error in report.layers.items():
        assert error.energy == pytest.approx(on_base.layers[name].energy)
        assert error.lost == pytest.approx(on_base.layers[name].lost, rel=1e-6, abs=1e-12)
    assert report.layers.keys() == on_base.layers.keys()
    one, other = (PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / n) for n in ("sum", "on_base"))
    for path, layer in one.base_model.lora_layers():
        mine, theirs = layer.adapters["default"], other.base_model.get_submodule(f"model.{path}").adapters["default"]
        if layers == "grouped conv":  # whose update is no one product
            close(mine.A, theirs.A, 1e-10)
            close(mine.B, theirs.B, 1e-10)
        else:
            close(mine.product(), theirs.product(), 1e-10)
        assert (mine.bias is None) == (theirs.bias is None)
        if mine.bias is not None:
            close(mine.bias, theirs.bias, 1e-12)


def test_one_adapter_of_weight_one_is_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Linears().double()
    saved(copy.deepcopy(base), tmp_path, a=LoraConfig(lora_alpha=5, use_rslora=True, **ON))
    combine_files([tmp_path / "a"], [1.0], tmp_path / "twin", Combining())
    assert_same_tensors(load_file(tmp_path / "a" / FILE), load_file(tmp_path / "twin" / FILE))
    model = read(base, tmp_path / "a", tmp_path / "twin")
    for path, delta in deltas(model, "a").items():
        close(deltas(model, "twin")[path], delta, 1e-15)


def test_files_of_peft_and_a_result_that_peft_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Linears().double()
    configs = {
        "a": peft.LoraConfig(use_rslora=True, rank_pattern={"second": 5}, **ON),
        "b": peft.LoraConfig(r=2, target_modules="first|head", lora_alpha=3),
    }
    for seed, (name, config) in enumerate(configs.items(), 11):
        model = peft.get_peft_model(copy.deepcopy(base), config)
        trained(model, seed)
        model.save_pretrained(tmp_path / name)
    combine_files(both(tmp_path), [0.7, -1.3], tmp_path / "sum", Combining("cat"))
    ours, theirs = (
        read(copy.deepcopy(base), *both(tmp_path), tmp_path / "sum"),
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum"),
    )
    assert distance(deltas(ours, "sum"), weighted(ours, WEIGHTS)) < 1e-12
    x = torch.randn(4, 12, dtype=torch.float64)
    ours.set_adapter("sum")
    with torch.no_grad():
        close(theirs.eval()(x), ours(x), 1e-12)


def test_a_module_trained_in_full_and_tables_of_the_base_come_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    saved(
        copy.deepcopy(base),
        tmp_path,
        a=LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        b=LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        c=LoraConfig(target_modules=["embed_tokens"]),
    )
    combine_files([tmp_path / n for n in "abc"], [1.0, 0.5, 0.5], tmp_path / "sum", Combining())
    tensors, source = load_file(tmp_path / "sum" / FILE), load_file(tmp_path / "a" / FILE)
    head = "base_model.model.lm_head.weight"
    assert torch.equal(tensors[head], source[head])
    model = PeftModel.from_pretrained(base, tmp_path / "sum")
    assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, source[head])


def test_dora_and_experts_on_their_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mixture().double()
    saved(
        copy.deepcopy(base),
        tmp_path,
        a=LoraConfig(target_modules=["head"], use_dora=True, init_lora_weights="pissa", r=2),
        b=LoraConfig(target_modules=["head"], target_parameters=["experts.up"], r=2),
    )
    assert "a: its formula, dora, is a change of the base weight" in str(why_base(both(tmp_path)))
    assert "does not say which parameters" in str(why_base([tmp_path / "b"]))
    combine_on_base(copy.deepcopy(base), both(tmp_path), [0.7, -1.3], tmp_path / "sum", Combining(svd_rank=4))
    model = read(base, *both(tmp_path), tmp_path / "sum")
    wanted = weighted(model, WEIGHTS)
    assert distance(deltas(model, "sum"), wanted) < 1e-12


def test_an_unconverted_pissa_of_peft_needs_its_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Linears(), peft.LoraConfig(init_lora_weights="pissa", **ON))
    model.save_pretrained(tmp_path / "a")
    assert "takes something out of the base that the file does not hold" in str(why_base([tmp_path / "a"]))


# ---- refused; nothing is written


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    saved(Linears(), tmp_path, a=LoraConfig(**ON), b=LoraConfig(lora_alpha=5, **ON))
    return both(tmp_path)


def refuses(
    sources: list[Path], kind: type[Exception], text: str, weights: list[float] | None = None, **how: Any
) -> None:
    out = sources[0].parent / "out"
    with pytest.raises(kind, match=text):
        combine_files(sources, weights or [1.0] * len(sources), out, Combining(**how))
    assert not out.exists()


def test_other_base_weights(pair: list[Path]) -> None:
    torch.manual_seed(1)
    saved(Linears(), pair[1].parent, b=LoraConfig(**ON))
    refuses(pair, AdapterError, r"b is for another base model.*weights of 2 layers differ: first, second")


def test_other_base_names_count_where_nothing_else_tells(pair: list[Path]) -> None:
    for folder, name in zip(pair, ("owner/one", "owner/two"), strict=True):
        edit_config(folder, base_model_name_or_path=name)
    combine_files(pair, [1.0, 1.0], pair[0].parent / "same", Combining())  # the fingerprints are equal
    for folder in pair:
        edit_tensors(folder, lambda tensors: None)  # as PEFT writes it, without one
    refuses(pair, AdapterError, r"different base models: .*a is for 'owner/one', .*b is for 'owner/two'")


def test_other_shapes(pair: list[Path], tmp_path: Path) -> None:
    class Wider(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(14, 20)

    saved(Wider(), tmp_path / "wide", b=LoraConfig(target_modules=["first"]))
    edit_tensors(tmp_path / "wide" / "b", lambda tensors: None)
    refuses(
        [pair[0], tmp_path / "wide" / "b"], CheckpointError, r"first is 20 x 12 in .* and 20 x 14 in .*different shapes"
    )


def test_a_head_trained_in_full_by_two_or_by_a_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    on: dict[str, Any] = {"modules_to_save": ["head"], **ON}
    saved(Linears(), tmp_path, a=LoraConfig(**on), b=LoraConfig(**on), c=LoraConfig(**ON))
    refuses(both(tmp_path), AdapterError, r"a and .*b both have 'head\.(bias|weight)' trained in full")
    refuses([tmp_path / "a", tmp_path / "c"], AdapterError, r"cannot be weighted by 0\.5", [0.5, 1.0])


def test_tables_of_different_vocabularies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    on = {"target_modules": ["q_proj"]}
    saved(llama(), tmp_path, a=LoraConfig(**on), b=LoraConfig(**on))
    for folder, rows in zip(both(tmp_path), (10, 11), strict=True):
        edit_tensors(folder, lambda t, rows=rows: t.update({"base_model.model.embed.weight": torch.ones(rows, 4)}))
    refuses(both(tmp_path), CheckpointError, r"different values of 'embed\.weight'.*vocabularies")


def test_what_a_config_does_not_speak_of(pair: list[Path]) -> None:
    key = "base_model.model.first.lora_magnitude_vector.weight"
    edit_tensors(pair[1], lambda tensors: tensors.update({key: torch.ones(20)}))
    refuses(pair, CheckpointError, r"1 tensors that its config does not speak of: first\.lora_magnitude_vector")


def test_a_config_of_another_rank(pair: list[Path]) -> None:
    edit_config(pair[1], r=4)
    refuses(pair, CheckpointError, r"not of one save: r is 4 and was 3 when the tensors were saved")
    edit_tensors(pair[1], lambda tensors: None)  # whose header says nothing then
    refuses(pair, CheckpointError, r"A and B of first are \(3, 12\) and \(20, 3\), and the config says rank 4")


@pytest.mark.parametrize("shape", [(-1,), (1, 1, -1)])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_no_matrices(factor: str, shape: tuple[int, ...], pair: list[Path], tmp_path: Path) -> None:
    place = pair[1] / "adapter_model.safetensors"
    tensors = load_file(place)
    key = next(key for key in tensors if factor in key)
    save_file(tensors | {key: tensors[key].reshape(shape).clone()}, place)
    text = "are no matrices of numbers|says rank .* Config and tensors are not of one adapter"
    with pytest.raises(CheckpointError, match=text):
        combine_files(pair, [1.0, 1.0], tmp_path / "out", Combining("cat"))


def test_half_a_pair(pair: list[Path]) -> None:
    edit_tensors(pair[1], lambda tensors: tensors.pop("base_model.model.first.lora_B.weight"))
    refuses(pair, CheckpointError, "has A or B alone of 1 layers: first")


def test_no_factors_at_all(pair: list[Path]) -> None:
    save_file({"x": torch.ones(2)}, pair[1] / FILE)
    refuses(pair, CheckpointError, "holds no factors of a LoRA adapter")


def test_biases_of_B_beside_an_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = LoraConfig(target_modules=["head"], lora_bias=True), LoraConfig(target_modules=["table"])
    saved(Lookup(), tmp_path, a=one, b=other)
    refuses(both(tmp_path), ConfigError, "table is an embedding, on which lora_bias is not defined")


def test_a_truncated_file(pair: list[Path]) -> None:
    (pair[1] / FILE).write_bytes((pair[1] / FILE).read_bytes()[:-100])
    refuses(pair, CheckpointError, "was cut off: 100 of")


def test_a_routed_adapter(pair: list[Path]) -> None:
    edit_config(pair[1], alora_invocation_tokens=[3])
    with pytest.raises(BackendError, match="the update of alora changes with the input"):
        why_base(pair)


def test_loftq(pair: list[Path]) -> None:
    edit_config(pair[1], init_lora_weights="loftq", loftq_config={"loftq_iter": 1, "loftq_bits": 4})
    with pytest.raises(CheckpointError, match="has quantized the base"):
        why_base(pair)


def test_one_adapter_by_two_names(pair: list[Path], tmp_path: Path) -> None:
    again = pair[0] / ".." / pair[0].name
    with pytest.raises(ConfigError, match="is given twice, and its update would count twice"):
        combine_files([pair[0], again], [1.0, 1.0], tmp_path / "out", Combining())
    with pytest.raises(ConfigError, match="is given twice"):
        combine_on_base(nn.Linear(2, 2), [pair[0], again], [1.0, 1.0], tmp_path / "out", Combining())


def test_a_folder_that_holds_something_is_left_alone(pair: list[Path]) -> None:
    before = sorted(path.name for path in pair[0].iterdir())
    with pytest.raises(ConfigError, match="exists and is not empty, and nothing is overwritten"):
        combine_files(pair, [1.0, 1.0], pair[0], Combining())
    assert sorted(path.name for path in pair[0].iterdir()) == before


def test_a_full_disk_leaves_nothing(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorafa.io.save.put_tensors", full)
    out = pair[0].parent / "out"
    with pytest.raises(CheckpointError, match="No space left on device"):
        combine_files(pair, [1.0, 1.0], out, Combining())
    assert not out.exists()


def test_the_types_about_factors_do_the_same_on_disk(pair: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = read(Linears(), *pair)
    for kind in (name for name, rule in COMBINATIONS.items() if rule.of_factors):
        how = density_for(kind)
        with pytest.warns(UserWarning, match="sums A with A") if kind == "linear" else nullcontext():
            combine_files(pair, [0.7, -1.3], tmp_path / kind, Combining(kind, seed=1, **how))
            model.add_weighted_adapter(["a", "b"], [0.7, -1.3], "default", kind, seed=1, **how)
        model.load_adapter(tmp_path / kind, kind)
        for path, value in deltas(model, "default").items():
            close(deltas(model, kind)[path], value, 1e-6)
        model.delete_adapter("default")
