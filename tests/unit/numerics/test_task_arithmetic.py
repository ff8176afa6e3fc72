"""Sums, pruning and elected signs of several updates, by their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.numerics.linalg import full_svd
from lorafa.numerics.low_rank import nearest_product, product_energy
from lorafa.numerics.task_arithmetic import (
    calculate_majority_sign_mask,
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_prune,
    prune,
    task_arithmetic,
    ties,
)
from toys.compare import close

WEIGHTS = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)


def three(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*(shape or (6, 7)), generator=generator, dtype=torch.float64) for _ in range(3)]


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_task_arithmetic_is_the_weighted_sum_and_changes_nothing_it_was_given() -> None:
    given = three()
    before = [tensor.clone() for tensor in given]
    close(task_arithmetic(given, WEIGHTS), 0.5 * given[0] - 2 * given[1] + given[2])
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


def test_pruning_by_magnitude_keeps_the_largest_entries_as_they_are() -> None:
    tensor = torch.tensor([[0.1, -3.0, 2.0], [0.0, -0.5, 1.0]])
    assert prune(tensor, 0.5, "magnitude").tolist() == [[0.0, -3.0, 2.0], [0.0, 0.0, 1.0]]
    assert prune(tensor, 1.0, "magnitude") is tensor


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.99])
def test_pruning_by_magnitude_keeps_so_many_also_where_sizes_are_equal(density: float) -> None:
    kept = prune(torch.ones(10, 11), density, "magnitude")
    assert int(kept.sum()) == int(density * 110)


def test_random_pruning_has_the_density_and_the_mean_of_what_it_prunes() -> None:
    tensor = torch.full((100, 100), 3.0)
    dropped, scaled = (prune(tensor, 0.3, "random", rescale, generator=source()) for rescale in (False, True))
    assert set(dropped.unique().tolist()) == {0.0, 3.0}
    assert (dropped != 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert scaled.mean() == pytest.approx(3.0, abs=0.2)
    assert torch.equal(scaled, prune(tensor, 0.3, "random", True, generator=source()))
    assert not torch.equal(scaled, prune(tensor, 0.3, "random", True, generator=source(1)))


def test_signs_are_elected_by_sums_or_by_counts_and_even_votes_are_positive() -> None:
    stack = torch.tensor([[5.0, -1.0, 0.0, 2.0], [-1.0, -1.0, 0.0, -2.0], [-1.0, 2.0, -3.0, 0.0]])
    assert calculate_majority_sign_mask(stack, "total").tolist() == [
        [True, False, False, True],
        [False, False, False, False],
        [False, True, True, False],
    ]
    assert calculate_majority_sign_mask(stack, "frequency").tolist() == [
        [False, True, False, True],
        [True, True, False, False],
        [True, False, True, False],
    ]


def test_a_disjoint_merge_averages_what_the_masks_choose() -> None:
    stack = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert disjoint_merge(stack, mask).tolist() == [3.0, 6.0, 0.0]


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_trims_elects_without_weights_and_averages_with_them(method: str) -> None:
    given, wanted = three(), torch.zeros(6, 7, dtype=torch.float64)
    pruned = [prune(tensor, 0.6, "magnitude") for tensor in given]
    for place in torch.cartesian_prod(torch.arange(6), torch.arange(7)):
        values = [float(tensor[tuple(place)]) for tensor in pruned]
        votes = sum(values) if method == "total" else sum((v > 0) - (v < 0) for v in values)
        agreeing = [i for i, v in enumerate(values) if v and (v > 0) == (votes >= 0)]
        total = sum(float(WEIGHTS[i]) * values[i] for i in agreeing)
        wanted[tuple(place)] = total / max(len(agreeing), 1)
    close(ties(given, WEIGHTS, 0.6, method), wanted)


def test_ties_of_equal_tensors_is_that_tensor() -> None:
    tensor = three()[0]
    close(ties([tensor] * 3, torch.ones(3), 1.0), tensor)


def test_magnitude_prune_prunes_each_and_sums() -> None:
    given = three()
    wanted = task_arithmetic([prune(tensor, 0.4, "magnitude") for tensor in given], WEIGHTS)
    close(magnitude_prune(given, WEIGHTS, 0.4), wanted)


def test_dare_is_pruning_at_random_and_then_the_sum_or_ties() -> None:
    given, random = three(), source()
    pruned = [prune(tensor, 0.4, "random", True, generator=random) for tensor in given]
    close(dare_linear(given, WEIGHTS, 0.4, generator=source()), task_arithmetic(pruned, WEIGHTS))
    close(dare_ties(given, WEIGHTS, 0.4, generator=source()), ties(pruned, WEIGHTS, 1.0))


def test_dare_is_the_weighted_sum_on_average() -> None:
    given, random = three(), source()
    mean = sum(dare_linear(given, WEIGHTS, 0.5, generator=random) for _ in range(2000)) / 2000
    wanted = task_arithmetic(given, WEIGHTS)
    assert float((mean - wanted).norm() / wanted.norm()) < 3 / 2000**0.5


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), "half", True])
def test_a_density_outside_of_its_range_is_refused(density: float) -> None:
    for merge in (magnitude_prune, ties, dare_linear, dare_ties):
        with pytest.raises(ConfigError, match=r"density must be the share of entries that is kept, in \(0, 1\]"):
            merge(three(), WEIGHTS, density)


def test_unknown_methods_and_no_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"majority_sign_method has no value 'totl'\. Did you mean 'total'"):
        ties(three(), WEIGHTS, 0.5, "totl")
    with pytest.raises(ConfigError, match="method has no value 'size'"):
        prune(three()[0], 0.5, "size")
    with pytest.raises(ConfigError, match="No tensors were given"):
        task_arithmetic([], torch.ones(0))


# ---- the nearest product


@pytest.mark.parametrize(("held", "out", "inputs"), [(3, 9, 7), (12, 9, 7), (7, 7, 7), (1, 1, 5), (20, 5, 30)])
@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_the_nearest_product_is_that_of_the_matrix(
    held: int, out: int, inputs: int, stack: tuple[int, ...], rank: int
) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(*stack, held, inputs).double(), torch.randn(*stack, out, held).double()
    found_A, found_B, S = nearest_product(A, B, rank)
    wanted, count = full_svd(B @ A), min(held, out, inputs)
    close(S, wanted.S[..., :count], 1e-12)
    close(found_B @ found_A, wanted.at(slice(0, rank)).product(), 1e-12)
    one = torch.eye(min(rank, count)).double().expand(*stack, -1, -1)
    close(found_A @ found_A.mT, one, 1e-12)
    assert bool((found_B.gather(-2, found_B.abs().argmax(-2, keepdim=True)) > 0).all())
    assert product_energy(A, B) == pytest.approx(float((B @ A).square().sum()), rel=1e-12)


def test_factors_of_low_rank_give_values_of_zero_and_orthonormal_rows_all_the_same() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 9).double(), torch.randn(8, 2).double()
    found_A, found_B, S = nearest_product(torch.cat([A, A, A * 0]), torch.cat([B, B, B], dim=1), 5)
    close(found_B @ found_A, 2 * B @ A, 1e-12)
    close(found_A @ found_A.mT, torch.eye(5).double(), 1e-12)
    assert float(S[2:].max()) < 1e-13
