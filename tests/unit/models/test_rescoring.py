"""The loss of a rescoring model: its laws in float64, padding, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.errors import ConfigError, DataError
from lorafa.models.rescoring import RescoringLoss, correlation_penalty, mwer_loss, total_costs

ALL = torch.ones(3, 5, dtype=torch.bool)


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, first-pass costs and errors of three lists of five."""
    generator = torch.Generator().manual_seed(seed)
    scores, first = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).to(dtype)
    return scores.requires_grad_(), first, torch.randint(0, 9, (3, 5), generator=generator)


def test_the_loss_is_the_formula_written_out() -> None:
    scores, first, errors = drawn()
    lists = []
    for s, a, e in zip(scores.tolist(), first.tolist(), errors.tolist(), strict=True):
        weights = [float(torch.tensor(-(x + 0.7 * y), dtype=torch.float64).exp()) for x, y in zip(a, s, strict=True)]
        mean = sum(e) / 5
        lists.append(sum(w / sum(weights) * (one - mean) for w, one in zip(weights, e, strict=True)))
    assert mwer_loss(scores, first, errors, ALL, 0.7).item() == pytest.approx(sum(lists) / 3, rel=1e-12)


def test_equal_errors_give_no_loss_and_no_gradient() -> None:
    scores, first, _ = drawn()
    loss = mwer_loss(scores, first, torch.tensor([[4] * 5, [0] * 5, [7] * 5]), ALL)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(loss) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_gradient_is_that_of_the_formula(beta: float) -> None:
    scores, first, errors = drawn()
    (gradient,) = torch.autograd.grad(mwer_loss(scores, first, errors, ALL, beta), scores)
    chance = torch.softmax(-(first + beta * scores), 1).detach()
    above = errors - errors.double().mean(1, keepdim=True)
    by_formula = -chance * (above - (chance * above).sum(1, keepdim=True))
    torch.testing.assert_close(gradient, beta * by_formula / 3, rtol=1e-12, atol=1e-14)  # a mean over three lists


def test_a_number_added_to_all_costs_of_a_list_changes_nothing() -> None:
    scores, first, errors = drawn()
    by_list = torch.tensor([[3.0], [-50.0], [700.0]], dtype=torch.float64)
    expected = mwer_loss(scores, first, errors, ALL)
    torch.testing.assert_close(mwer_loss(scores, first + by_list, errors, ALL), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mwer_loss(scores + by_list, first, errors, ALL), expected, rtol=1e-10, atol=1e-12)


def test_scores_that_know_the_errors_come_near_the_lowest_loss_and_none_falls_below_it() -> None:
    _, first, errors = drawn()
    lowest = float((errors.min(1).values - errors.double().mean(1)).mean())
    sharper = [float(mwer_loss(errors * size, first, errors, ALL)) for size in (0.0, 1.0, 10.0, 100.0)]
    assert sharper == sorted(sharper, reverse=True)
    assert sharper[-1] == pytest.approx(lowest, abs=1e-9)
    for seed in range(20):
        other, start, same = drawn(seed)
        bound = float((same.min(1).values - same.double().mean(1)).mean())
        assert float(mwer_loss(10 * other, start, same, ALL)) >= bound - 1e-12


@pytest.mark.parametrize("filler", [0.0, 1e9, -1e9, float("nan"), float("inf")])
def test_padding_changes_neither_loss_nor_gradients_whatever_stands_there(filler: float) -> None:
    scores, first, errors = drawn()
    loss = mwer_loss(scores, first, errors, ALL)
    (expected,) = torch.autograd.grad(loss, scores)
    wider = [torch.cat([t.detach().double(), torch.full((3, 2), filler, dtype=torch.float64)], 1) for t in drawn()]
    wider[0].requires_grad_()
    mask = torch.cat([ALL, torch.zeros(3, 2, dtype=torch.bool)], 1)
    padded = mwer_loss(*wider, mask)
    (gradient,) = torch.autograd.grad(padded, wider[0])
    torch.testing.assert_close(padded, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, torch.cat([expected, torch.zeros(3, 2)], 1), rtol=1e-12, atol=1e-15)


def test_a_list_of_one_hypothesis_gives_nothing_to_learn() -> None:
    scores, first, errors = drawn()
    mask = torch.zeros_like(ALL)
    mask[:, 2] = True
    loss = mwer_loss(scores, first, errors, mask)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(loss) == 0
    assert not gradient.any()


def test_lists_weigh_alike_however_long_they_are() -> None:
    scores, first, errors = drawn()
    mask = ALL.clone()
    mask[1, 3:] = False
    each = [
        mwer_loss(scores[at : at + 1, mask[at]], first[at : at + 1, mask[at]], errors[at : at + 1, mask[at]],
                  ALL[:1, : int(mask[at].sum())])
        for at in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(mwer_loss(scores, first, errors, mask), torch.stack(each).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_are_added_and_compared_in_float32(dtype: torch.dtype) -> None:
    scores, _, errors = drawn(dtype=dtype)
    first = torch.full((3, 5), 1000.25)  # bfloat16 has no such number, and would drop the scores beside it
    loss = mwer_loss(scores, first, errors, ALL)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mwer_loss(scores.float(), first * 0, errors, ALL), rtol=1e-3, atol=1e-4)


def test_total_costs_are_infinite_on_padding_so_that_it_is_never_chosen() -> None:
    scores, first, _ = drawn()
    mask = ALL.clone()
    mask[0, 4] = False
    costs = total_costs(scores, first, mask, beta=2.0)
    assert costs[0, 4] == float("inf")
    torch.testing.assert_close(costs[mask], (first + 2 * scores)[mask])


# ---- the penalty


def test_the_penalty_is_the_squared_norm_of_the_correlations_without_their_diagonal() -> None:
    vectors = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 5
    apart = torch.corrcoef(vectors.T) - torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(correlation_penalty(vectors), torch.linalg.matrix_norm(apart) ** 2)


def test_uncorrelated_features_cost_nothing_and_copies_of_one_cost_all() -> None:
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert float(correlation_penalty(signs)) == pytest.approx(0, abs=1e-15)
    one = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    assert float(correlation_penalty(torch.cat([one, 3 * one + 1, -one], 1))) == pytest.approx(6)


def test_the_penalty_does_not_depend_on_the_size_or_place_of_features() -> None:
    vectors = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = vectors * torch.arange(1, 9) + torch.arange(8) * 10
    torch.testing.assert_close(correlation_penalty(moved), correlation_penalty(vectors))


def test_at_the_default_weight_the_penalty_counts_beside_word_errors() -> None:
    wide = torch.randn(40, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    penalty = float(correlation_penalty(wide))
    assert penalty == pytest.approx(384 * 383 / 39, rel=0.05)  # what 40 vectors at random have
    assert RescoringLoss().weight * penalty > 1


def test_the_penalty_has_the_gradient_of_its_differences() -> None:
    vectors = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(correlation_penalty, (vectors,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_features_and_single_vectors_count_as_uncorrelated_and_keep_gradients_finite(dtype: Any) -> None:
    vectors = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    vectors[:, 1] = 0.1  # what rounding leaves of its spread is not 0
    given = vectors.to(dtype).requires_grad_()
    penalty = correlation_penalty(given)
    penalty.backward()
    others = correlation_penalty(vectors[:, [0, 2, 3, 4]].to(dtype))
    torch.testing.assert_close(penalty, others, rtol=1e-4, atol=1e-6)
    assert given.grad is not None
    assert given.grad.isfinite().all()
    assert not given.grad[:, 1].any()
    single = torch.randn(1, 5, dtype=dtype).requires_grad_()
    penalty = correlation_penalty(single)
    penalty.backward()
    assert float(penalty) == 0
    assert single.grad is not None
    assert not single.grad.any()


def test_the_objective_is_the_sum_of_both_and_its_weights_are_exposed() -> None:
    scores, first, errors = drawn()
    vectors = torch.randn(15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mwer, penalty = mwer_loss(scores, first, errors, ALL, 0.5), correlation_penalty(vectors)
    torch.testing.assert_close(RescoringLoss(0.5, 2.0)(scores, first, errors, ALL, vectors), mwer + 2 * penalty)
    torch.testing.assert_close(RescoringLoss(0.5, 0.0)(scores, first, errors, ALL, vectors), mwer)
    assert RescoringLoss() == RescoringLoss(beta=1.0, weight=0.01)


# ---- what is refused


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"first_pass": torch.zeros(3, 4)}, r"have one shape \(lists, hypotheses\), found \(3, 5\), \(3, 4\)"),
        ({"mask": torch.ones(3, 5)}, r"The mask is of booleans, .* found torch\.float32"),
        ({"mask": torch.tensor([[True] * 5, [False] * 5, [True] * 5])}, "A list has no hypothesis"),
        ({"errors": torch.zeros(5)}, r"errors of shape \(5,\) for scores of shape \(3, 5\)"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changed: dict[str, Tensor], words: str) -> None:
    scores, first, errors = drawn()
    with pytest.raises(DataError, match=words):
        mwer_loss(**({"scores": scores, "first_pass": first, "errors": errors, "mask": ALL} | changed))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 4)])
def test_vectors_that_are_no_matrix_of_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"Vectors are of shape \(batch, width\)"):
        correlation_penalty(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta is a number above 0, found 0"),
        ({"beta": float("nan")}, "beta is a number above 0, found nan"),
        ({"weight": -1.0}, "penalty is a number from 0 on, found -1"),
        ({"weight": float("inf")}, "penalty is a number from 0 on, found inf"),
    ],
)
def test_weights_that_mean_nothing_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RescoringLoss(**settings)
