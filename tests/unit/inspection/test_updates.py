"""The update of a layer out of its file alone is the one the model computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import CheckpointError
from lorafa.inspection.updates import beside, updates_in, updates_of
from lorafa.io.adapter_files import read_adapter
from lorafa.storage.tensors import read_tensors, write_tensors
from lorafa.surgery.walk import PREFIX
from toys.adapters import DEFINED, VARIANT, adapted, starts_of, train
from toys.compare import close
from toys.layers import backend_for
from toys.models import Convolution, Mixture, Tied, Two
from toys.parity import CASES as PEFT_CASES
from toys.parity import Case, quiet, trained

LINEAR = "torch.nn.modules.linear.Linear"
CASES = [
    (variant, kind, start)
    for variant, kind in DEFINED
    if not backend_for(kind).quantized and (variant in ("lora", "dora") or kind == LINEAR)
    for start in starts_of(variant, True, "pissa")
]


def assert_as_in(model: nn.Module, folder: Path) -> None:
    """Everything that the file says of the updates is what the model has."""
    live = [update for update, _ in updates_in(model, "default")]
    read = updates_of(read_adapter(folder))
    assert [update.name for update in read] == [update.name for update in live]
    for one, other in zip(read, live, strict=True):
        for field in ("rank", "alpha", "formula", "complete", "everywhere", "shape"):
            assert getattr(one, field) == getattr(other, field), field
        close(one.scaling * (one.B @ one.A), other.scaling * (other.B @ other.A), 1e-6)


@pytest.mark.parametrize(("variant", "kind", "start"), CASES)
def test_every_formula_and_start_on_every_kind_of_layer(
    tmp_path: Path, variant: str, kind: str, start: bool | str
) -> None:
    torch.manual_seed(0)
    settings = VARIANT[variant] | {"init_lora_weights": VARIANT[variant].get("init_lora_weights", start)}
    model = adapted(kind, dtype=torch.float64, **settings).eval()
    model.save_pretrained(tmp_path)
    assert_as_in(model.get_base_model(), tmp_path)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    "case", ["linear-everything", "linear-dora_rslora", "linear-rank_pattern", "conv2d-groups", "conv1d-dora",
             "attention", "parameter-3d", "embedding-and-linear", "embedding-tokens", "mixtral-router"],
)  # fmt: skip
def test_the_models_of_the_comparison_with_peft(tmp_path: Path, case: str, twice: bool) -> None:
    found = PEFT_CASES[case]
    ours = {"attention_out_proj_twice": twice} if case == "attention" else {}
    model = trained(Case(found.model, found.run, found.settings, ours).lorafa())
    model.save_pretrained(tmp_path)
    assert_as_in(model.get_base_model(), tmp_path)


@pytest.mark.parametrize(
    "case", ["linear-rslora", "linear-dora", "conv3d", "attention", "parameter-3d", "embedding", "gpt2-dora"]
)
def test_files_that_peft_writes(tmp_path: Path, case: str) -> None:
    found = PEFT_CASES[case]
    with quiet():
        trained(found.peft()).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(found.base(), tmp_path)
    assert_as_in(model.get_base_model(), tmp_path)


def test_nested_stacks_are_named_by_the_model_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["up", "down"])
    model = get_peft_model(Mixture(), config)
    train(model)
    model.save_pretrained(tmp_path)
    read = {update.name: update for update in updates_of(read_adapter(tmp_path))}
    live = {update.name: update for update, _ in updates_in(model.get_base_model(), "default")}
    assert set(read) == {"experts", "experts.base_layer"}
    assert set(live) == {"experts.up", "experts.down"}
    assert sorted(map(_size, read.values())) == pytest.approx(sorted(map(_size, live.values())))


def _size(update: Any) -> float:
    return float(torch.linalg.vector_norm(update.B @ update.A))


def test_nested_stacks_of_other_ranks_need_the_model(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["up", "down"], rank_pattern={"up": 1})
    get_peft_model(Mixture(), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"whose ranks differ, and a file does not say .* Give the base model"):
        updates_of(read_adapter(tmp_path))


def test_layers_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    get_peft_model(model, LoraConfig(r=1, target_modules="all-linear")).save_pretrained(tmp_path)
    assert [update.name for update in updates_of(read_adapter(tmp_path))] == [str(number) for number in range(12)]


def test_what_lies_beside_the_factors_is_listed(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["proj"], modules_to_save=["head"], use_dora=True,
                        trainable_token_indices={"embed": [3, 7]})  # fmt: skip
    get_peft_model(Tied(tied=False), config).save_pretrained(tmp_path)
    assert beside(read_adapter(tmp_path)) == {"head.weight": 60, "embed.token_adapter.trainable_tokens_delta": 12}


# ---- files that are not what they should be


def saved(folder: Path, **settings: Any) -> Path:
    config = LoraConfig(**{"r": 4, "target_modules": ["first", "second"]} | settings)
    get_peft_model(Two(), config).save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, change(tensors), metadata)


DAMAGE: dict[str, tuple[Any, str]] = {
    "one half": (lambda t: {k: v for k, v in t.items() if "first.lora_A" not in k}, "has A or B alone of 1 layers"),
    "nothing": (lambda t: {"a.hada_w1": torch.zeros(2)}, "holds no factors of a LoRA adapter; its keys are: a.hada_w1"),
    "a row": (lambda t: {k: v[0] if "A" in k else v for k, v in t.items()}, "no matrices of numbers: first, second"),
    "numbers": (lambda t: {k: v.int() for k, v in t.items()}, r"holds whole numbers \(torch.int32\)"),
    "B of a kernel": (
        lambda t: {k: v[..., None, None] if "lora_B" in k else v for k, v in t.items()},
        r"first are \(4, \d+\) and \(\d+, 4, 1, 1\), and the config says rank 4",
    ),
    "ranks": (
        lambda t: {k: v[:3] if "lora_A" in k else v for k, v in t.items()},
        r"first are \(3, \d+\) and \(\d+, 4\), and the config says rank 4",
    ),
    "of no formula": (
        lambda t: t | {f"{PREFIX}first.lora_x.bias": torch.ones(2)},
        "1 tensors that its config does not speak of: first.lora_x.bias",
    ),
    "both kinds": (
        lambda t: t | {f"{PREFIX}first.lora_embedding_{one}": torch.ones(4, 4) for one in "AB"},
        "tensors that its config does not speak of: first.lora_",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_is_not_what_its_config_says_is_refused(tmp_path: Path, case: str) -> None:
    change, text = DAMAGE[case]
    rewritten(saved(tmp_path), change)
    with pytest.raises(CheckpointError, match=text):
        updates_of(read_adapter(tmp_path))


def test_another_rank_in_the_config_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(CheckpointError, match=r"not of one save: r is 8 and was 4 when the tensors"):
        updates_of(read_adapter(tmp_path))
    with pytest.raises(CheckpointError, match=r"A and B of first are .*, and the config says rank 8"):
        updates_of(read_adapter(tmp_path, ignore_config_mismatch=True))


def test_an_extra_that_is_missing_is_named(tmp_path: Path) -> None:
    kasa = peft.LoraConfig(r=4, target_modules=["first", "second"], kasa_config=peft.tuners.lora.KasaConfig())
    with quiet():
        peft.get_peft_model(Two(), kasa).save_pretrained(tmp_path)
    assert len(updates_of(read_adapter(tmp_path))) == 2
    saved_tensors = read_tensors(tmp_path / "adapter_model.safetensors")[0]
    rewritten(tmp_path, lambda t: {k: v[:3] if "diag" in k else v for k, v in t.items()})
    with pytest.raises(CheckpointError, match="the tensors of 'first' are not those of kasa: The size of tensor"):
        updates_of(read_adapter(tmp_path))
    rewritten(tmp_path, lambda _: {k: v for k, v in saved_tensors.items() if "diag" not in k})
    with pytest.raises(CheckpointError, match="lacks the 'diagonal' of 'first', which kasa needs"):
        updates_of(read_adapter(tmp_path))


def test_a_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, use_dora=True, init_lora_weights="pissa")
    assert len(updates_of(read_adapter(tmp_path))) == 2
    rewritten(tmp_path, lambda t: {k: v[:2] if "lora_start.A" in k else v for k, v in t.items()})
    with pytest.raises(CheckpointError, match=r"lora_start.A and lora_start.B of 'first' are not of the shapes and"):
        updates_of(read_adapter(tmp_path))


def test_a_grouped_convolution_has_zeros_between_its_groups(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["conv"])
    model = get_peft_model(Convolution(1, groups=2), config)
    train(model)
    model.save_pretrained(tmp_path)
    (update,) = updates_of(read_adapter(tmp_path))
    assert update.shape == (6, 12)
    assert not update.B[:3, 2:].any()
    assert not update.B[3:, :2].any()
