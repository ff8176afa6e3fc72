"""The published parameter tables for OPT, from configs alone; docs/params.md says what they show.

LoRA's column is in the document on LoRA, the other one in the document on LoRA-FA, both "with r=16, alpha=16".
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import combinations

import pytest

from lorafa import LoraConfig
from lorafa.costs.accounting import AdapterCost, adapter_cost
from lorafa.models.shapes import shape_model

BASE = {"opt-125m": 125_239_296, "opt-350m": 331_196_416, "opt-1.3b": 1_315_758_080}
"""Parameters of the models, the tied output head counted once."""
LORA = {
    "opt-125m": (2_359_296, "9.00", "1.88%"),
    "opt-350m": (6_291_456, "24.00", "1.90%"),
    "opt-1.3b": (12_582_912, "48.00", "0.96%"),
}
LORA_FA = {
    "opt-125m": (589_824, "1.12", "0.47%"),
    "opt-350m": (1_572_864, "3.00", "0.47%"),
    "opt-1.3b": (3_145_728, "6.00", "0.24%"),
}
"""Parameters, megabytes (of 2**20 bytes) and share, as printed."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYERS = (*ATTENTION, "fc1", "fc2")
FLOAT32, FLOAT16 = 4, 2


@cache
def cost(model: str, rank: int, targets: tuple[str, ...], freeze_A: bool) -> AdapterCost:
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=list(targets), freeze_A=freeze_A)
    return adapter_cost(shape_model(model), config)


def printed(model: str, rank: int, targets: tuple[str, ...], freeze_A: bool, size: int) -> tuple[int, str, str]:
    """What the tables print, for numbers of ``size`` bytes."""
    found = cost(model, rank, targets, freeze_A)
    return found.trainable, f"{size * found.trainable / 2**20:.2f}", f"{found.share:.2%}"


def target_sets() -> Iterator[tuple[str, ...]]:
    return (chosen for count in range(1, len(LAYERS) + 1) for chosen in combinations(LAYERS, count))


@pytest.mark.parametrize("model", BASE)
def test_base_models_have_their_published_size(model: str) -> None:
    assert cost(model, 16, ATTENTION, False).base == BASE[model]


@pytest.mark.parametrize(
    ("rank", "targets"),
    [(32, ATTENTION), (64, ("q_proj", "v_proj")), (16, ("q_proj", "k_proj", "v_proj", "fc1", "fc2"))],
)
@pytest.mark.parametrize("model", LORA)
def test_lora_column_counts_A_and_B_in_float32(model: str, rank: int, targets: tuple[str, ...]) -> None:
    assert printed(model, rank, targets, False, FLOAT32) == LORA[model]


@pytest.mark.parametrize(
    ("rank", "targets", "freeze_A"),
    [(16, ATTENTION, True), (32, ("q_proj", "v_proj"), True), (16, ("q_proj", "v_proj"), False)],
)
@pytest.mark.parametrize("model", LORA_FA)
def test_lora_fa_column_is_in_16_bit_and_may_count_A_or_not(
    model: str, rank: int, targets: tuple[str, ...], freeze_A: bool
) -> None:
    assert printed(model, rank, targets, freeze_A, FLOAT16) == LORA_FA[model]


@pytest.mark.parametrize("model", BASE)
def test_the_sizes_of_the_two_columns_are_printed_in_different_dtypes(model: str) -> None:
    """At the numbers of parameters that the columns have, one dtype prints each size, and not the same one."""
    columns = (LORA[model], cost(model, 32, ATTENTION, False)), (LORA_FA[model], cost(model, 16, ATTENTION, True))
    fitting = [
        [size for size in (FLOAT32, FLOAT16) if f"{size * found.trainable / 2**20:.2f}" == column[1]]
        for column, found in columns
    ]
    assert fitting == [[FLOAT32], [FLOAT16]]


@pytest.mark.parametrize("model", BASE)
def test_no_choice_of_layers_makes_freezing_A_save_the_factor_of_four_between_the_columns(model: str) -> None:
    """Freezing A saves (in + out) / out: 5 on fc2, which is (d, 4 d), 5/4 on fc1, 2 on a square."""
    factors = {kind.name: (kind.A, kind.B) for kind in cost(model, 16, LAYERS, False).kinds}
    sums = [tuple(map(sum, zip(*(factors[name] for name in chosen), strict=True))) for chosen in target_sets()]
    saved = [Fraction(A + B, B) for A, B in sums]
    assert (len(saved), min(saved), max(saved)) == (63, Fraction(5, 4), 5)
    assert Fraction(LORA[model][0], LORA_FA[model][0]) not in saved


@pytest.mark.parametrize("model", BASE)
def test_freezing_A_saves_half_of_what_is_trained_on_the_attention_projections(model: str) -> None:
    assert 2 * cost(model, 16, ATTENTION, True).trainable == cost(model, 16, ATTENTION, False).trainable


@pytest.mark.parametrize("model", BASE)
def test_a_lora_fa_file_holds_A_too_and_is_as_large_as_loras(model: str) -> None:
    frozen, trained = (cost(model, 16, ATTENTION, freeze_A) for freeze_A in (True, False))
    assert frozen.stored == trained.stored == 2 * LORA_FA[model][0]


def test_shares_are_of_the_base_alone() -> None:
    found = cost("opt-125m", 32, ATTENTION, False)
    assert f"{found.trainable / (found.base + found.trainable):.2%}" == "1.85%"
    assert f"{found.share:.2%}" == LORA["opt-125m"][2] == "1.88%"
