"""Combinations beside PEFT's where those are right: plain LoRA of one rank, alpha / r, linear layers, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn

import lorafa
from lorafa.numerics import task_arithmetic
from lorafa.surgery.combining import COMBINATIONS
from toys.combined import density_for
from toys.compare import close
from toys.models import Linears, Lookup
from toys.parity import on, quiet, trained

ON: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]}
DRAWN = [kind for kind in COMBINATIONS if "dare" in kind]
RUN = on(5, 12)


def both(folder: Path, model: Any = Linears, **settings: Any) -> tuple[lorafa.PeftModel, peft.PeftModel]:
    """Two trained adapters of PEFT in PEFT, and the same of their files in lorafa."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model().double(), peft.LoraConfig(**ON | settings), "one")
    trained(theirs)
    theirs.add_adapter("two", peft.LoraConfig(**ON | settings))
    theirs.set_adapter("two")
    trained(theirs, 12)
    theirs.save_pretrained(folder)
    torch.manual_seed(0)
    ours = lorafa.PeftModel.from_pretrained(model().double(), folder / "one", "one", config=None)
    ours.load_adapter(folder / "two", "two")
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("weights", [[0.6, 0.4], [1.5, -0.7]], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in COMBINATIONS if kind not in DRAWN])
def test_outputs_of_a_combination_are_those_of_pefts(kind: str, weights: list[float], tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    settings: dict[str, Any] = density_for(kind) | ({"svd_rank": 4} if "svd" in kind else {})
    with quiet():
        for model in (ours, theirs):
            model.add_weighted_adapter(["one", "two"], weights, "sum", kind, **settings)
            model.set_adapter("sum")
    with torch.no_grad():
        close(RUN(ours), RUN(theirs), 1e-12 if kind == "cat" else 1e-6)  # PEFT's weights are float32


@pytest.mark.parametrize("kind", ["cat", "linear", "svd", "ties_svd"])
def test_on_an_embedding_too(kind: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, Lookup, target_modules=["table", "head"])
    ids = torch.arange(16)[None]
    with quiet():
        for model in (ours, theirs):
            model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum", kind, **density_for(kind))
            model.set_adapter("sum")
    with torch.no_grad():
        close(ours(ids), theirs(ids), 1e-5)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_peft_reads_the_file_of_a_combination(kind: str, tmp_path: Path) -> None:
    ours, _ = both(tmp_path)
    with quiet():
        ours.add_weighted_adapter(["one", "two"], [0.6, -0.4], "sum", kind, **density_for(kind))
    ours.set_adapter("sum")
    ours.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    read = peft.PeftModel.from_pretrained(Linears().double(), tmp_path / "sum").eval()
    with torch.no_grad():
        close(RUN(read), RUN(ours.eval()), 1e-12)


def tensors(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(9, 8, generator=generator, dtype=torch.float64) for _ in range(count)]


WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.75])
def test_ties_and_magnitude_prune_are_pefts(density: float, method: str) -> None:
    given = tensors()
    close(
        task_arithmetic.ties(given, WEIGHTS, density, method), merge_utils.ties(given, WEIGHTS, density, method), 1e-14
    )
    found = task_arithmetic.magnitude_prune(given, WEIGHTS, density)
    close(found, merge_utils.magnitude_prune(given, WEIGHTS, density), 1e-14)
    stack = torch.stack(given)
    mask = task_arithmetic.calculate_majority_sign_mask(stack, method)
    assert torch.equal(mask, merge_utils.calculate_majority_sign_mask(stack, method))
    close(task_arithmetic.disjoint_merge(stack, mask), merge_utils.disjoint_merge(stack, mask), 1e-14)


def test_names_are_those_of_pefts_module() -> None:
    names = (
        *("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties", "prune"),
        *("calculate_majority_sign_mask", "disjoint_merge"),
    )
    for name in names:
        ours, theirs = getattr(task_arithmetic, name), getattr(merge_utils, name)
        count = theirs.__code__.co_argcount
        assert ours.__code__.co_varnames[:count] == theirs.__code__.co_varnames[:count]


# ---- where PEFT's numbers are off


WRONG: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True, "target_modules": ["first"]},
    "kasa": {"kasa_config": {}},
}


@pytest.mark.filterwarnings("ignore:Adapter ")  # PEFT takes a bias of B for the shard of a matrix
@pytest.mark.parametrize("formula", WRONG)
def test_peft_is_wrong_for_some_and_lorafa_is_not(formula: str, tmp_path: Path) -> None:
    settings = dict(WRONG[formula])
    if "kasa_config" in settings:
        settings["kasa_config"] = peft.KasaConfig()
    ours, theirs = both(tmp_path, **settings)
    base = theirs.base_model.model.first.base_layer.weight.clone()

    def change(model: Any, name: str) -> Tensor:
        layer = model.base_model.model.first
        model.set_adapter(name)
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            return layer(x) - nn.functional.linear(x, base, layer.base_layer.bias)

    wanted = {model: 0.5 * change(model, "one") + 2 * change(model, "two") for model in (ours, theirs)}
    for model in (ours, theirs):
        model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum", "svd", svd_rank=12 if formula == "dora" else 6)
    if formula != "kasa":  # whose files say what PEFT took from the base by its start alone
        close(wanted[ours], wanted[theirs], 1e-12)
        close(change(ours, "sum"), wanted[ours], 1e-10)
    assert float((change(theirs, "sum") - wanted[theirs]).norm() / wanted[theirs].norm()) > 0.02
