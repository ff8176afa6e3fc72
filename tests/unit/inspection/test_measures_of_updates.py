"""Norms, spectra, ranks and similarities of updates are those of the dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafa.errors import CheckpointError
from lorafa.inspection.effect import compared
from lorafa.inspection.measures import cosine_of, likeness, measured, shares
from lorafa.inspection.updates import LayerUpdate


def update(
    seed: int = 0, *, stack: int = 0, rank: int = 3, out: int = 9, in_: int = 7, scaling: float = 1.5
) -> LayerUpdate:
    generator = torch.Generator().manual_seed(seed)
    experts = (stack,) if stack else ()
    A = torch.randn(*experts, rank, in_, generator=generator, dtype=torch.float64)
    B = torch.randn(*experts, out, rank, generator=generator, dtype=torch.float64)
    return LayerUpdate("layers.0.q_proj", A, B, scaling, rank, 4, "lora")


def dense(one: LayerUpdate) -> Tensor:
    """The update as one matrix; a stack as a block-diagonal one."""
    D = one.scaling * one.B @ one.A
    return torch.block_diag(*D) if D.dim() == 3 else D


@pytest.mark.parametrize("stack", [0, 4])
@pytest.mark.parametrize("scaling", [1.5, -0.5])
def test_numbers_of_an_update_are_those_of_the_dense_matrix(stack: int, scaling: float) -> None:
    one = update(stack=stack, scaling=scaling)
    D, found = dense(one), measured(one)
    values = torch.linalg.svdvals(D)[: 3 * max(stack, 1)]
    assert found.values == pytest.approx(values.tolist())
    assert found.frobenius == pytest.approx(float(torch.linalg.matrix_norm(D)))
    assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(D, 2)))
    p = values.square() / values.square().sum()
    assert found.effective_rank == pytest.approx(math.exp(float(-(p * p.log()).sum())))
    assert found.stable_rank == pytest.approx(found.frobenius**2 / found.spectral**2)
    assert found.energy == pytest.approx(found.frobenius**2)


def test_an_update_of_zeros_has_no_rank_and_no_share() -> None:
    zero = update(scaling=0.0)
    found = measured(zero)
    assert (found.frobenius, found.effective_rank, found.stable_rank) == (0, 0, 0)
    assert shares([found, found]) == [0, 0]
    assert cosine_of([(zero, update())]) is None
    assert likeness(zero, update()).cosine is None


def test_shares_are_those_of_the_squares() -> None:
    one, other = measured(update()), measured(update(1, scaling=0.3))
    first, second = shares([one, other])
    assert first + second == pytest.approx(1)
    assert first / second == pytest.approx(one.energy / other.energy)


@pytest.mark.parametrize("stack", [0, 4])
def test_cosine_is_that_of_the_dense_matrices(stack: int) -> None:
    one, other = update(stack=stack), update(1, stack=stack, rank=5, scaling=-2.0)
    D, E = dense(one), dense(other)
    expected = float((D * E).sum() / (D.norm() * E.norm()))
    assert likeness(one, other).cosine == pytest.approx(expected)
    assert likeness(other, one).cosine == pytest.approx(expected)
    assert likeness(one, one).cosine == pytest.approx(1)


def test_cosine_of_several_layers_is_that_of_one_long_vector() -> None:
    pairs = [(update(0), update(1)), (update(2, out=4), update(3, out=4))]
    D, E = (torch.cat([dense(pair[side]).flatten() for pair in pairs]) for side in (0, 1))
    assert cosine_of(pairs) == pytest.approx(float(D @ E / (D.norm() * E.norm())))


def test_similarity_of_spaces_does_not_see_how_the_product_is_split() -> None:
    one, mixing = update(), update(5, rank=3, out=3, in_=3).A
    turned = LayerUpdate(one.name, mixing @ one.A, one.B @ torch.linalg.inv(mixing), one.scaling, 3, 4, "lora")
    found = likeness(one, turned)
    assert (found.cosine, found.rows, found.columns) == pytest.approx((1, 1, 1))
    apart = likeness(one, update(1))
    assert 0 < apart.rows < 1
    assert 0 < apart.columns < 1


def test_updates_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(CheckpointError, match=r"is 9 x 7 in one adapter and 9 x 8 in the other: .* different base"):
        likeness(update(), update(in_=8))


# ---- the effect on logits


def test_effect_is_the_divergence_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, adapted = (torch.randn(150, 11, generator=generator) for _ in range(2))
    p, q = plain.double().log_softmax(-1), adapted.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    found = compared(plain, adapted)
    assert found.positions == 150
    assert found.kl == pytest.approx(float(kl.mean()))
    assert found.largest_kl == pytest.approx(float(kl.max()))
    assert found.difference == pytest.approx(float((plain - adapted).abs().max()))
    assert found.changed == pytest.approx(float((plain.argmax(-1) != adapted.argmax(-1)).float().mean()))


def test_equal_logits_have_no_effect_also_where_a_token_is_impossible() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [3.0, -2000.0, 1.0]])
    found = compared(logits, logits)
    assert (found.kl, found.changed) == (0, 0)
    assert found.difference == 0
