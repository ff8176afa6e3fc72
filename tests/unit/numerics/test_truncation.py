"""The best product of a rank, and what it loses, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafa.numerics.truncation import Truncated, rank_for, truncated_matrix, truncated_product
from toys.compare import close


def factors(*stack: int, m: int = 9, n: int = 7, rank: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(*stack, rank, n, generator=generator, dtype=torch.float64)
    return A, torch.randn(*stack, m, rank, generator=generator, dtype=torch.float64)


def best(M: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


def assert_is_best(found: Truncated, M: Tensor, rank: int) -> None:
    assert found.A.shape[-2] == found.B.shape[-1] == found.rank == rank
    close(found.B @ found.A, best(M, rank))
    assert found.total == pytest.approx(float(M.square().sum()))
    assert found.lost == pytest.approx(float((M - best(M, rank)).square().sum()), rel=1e-9, abs=1e-24)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_the_factors_are_the_best_of_their_rank_and_say_what_is_lost(rank: int, stack: tuple[int, ...]) -> None:
    A, B = factors(*stack)
    assert_is_best(truncated_product(A, B, rank), B @ A, rank)
    assert_is_best(truncated_matrix(B @ A, rank), B @ A, rank)


@pytest.mark.parametrize("rank", [4, 5, 7])
def test_a_rank_that_is_enough_loses_nothing(rank: int) -> None:
    A, B = factors()
    for found in (truncated_product(A, B, rank), truncated_matrix(B @ A, rank)):
        close(found.B @ found.A, B @ A)
        assert found.share < 1e-25


def test_a_share_takes_the_least_rank_that_keeps_it() -> None:
    A, B = factors()
    energies = torch.linalg.svdvals(B @ A).square()
    for share in (0.3, 0.8, 0.95, 0.9999, 1.0):
        for found in (truncated_product(A, B, share), truncated_matrix(B @ A, share)):
            kept = energies[: found.rank].sum() / energies.sum()
            assert kept >= share * (1 - 1e-12)
            assert found.rank == 1 or energies[: found.rank - 1].sum() / energies.sum() < share
            assert found.share == pytest.approx(1 - float(kept), abs=1e-12)


def test_a_share_of_a_stack_is_kept_of_each_matrix() -> None:
    energies = torch.tensor([[9.0, 1.0, 0.0], [4.0, 3.0, 3.0]])
    assert rank_for(energies, 0.9) == 3
    assert rank_for(energies[:1], 0.9) == 1


def test_an_update_of_zero_is_one_rank_of_zeros() -> None:
    for found in (
        truncated_product(torch.ones(3, 5), torch.zeros(6, 3), 0.9),
        truncated_matrix(torch.zeros(6, 5), 0.9),
    ):
        assert (found.rank, found.total, found.share) == (1, 0.0, 0.0)
        assert float((found.B @ found.A).abs().max()) == 0.0


def test_more_ranks_than_the_sides_of_the_factors_are_zeros() -> None:
    A, B = factors(rank=2)
    found = truncated_product(A, B, 6)
    assert found.A.shape == (6, 7)
    assert found.A[2:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_lower_precision_are_decomposed_in_float32(dtype: torch.dtype) -> None:
    A, B = (one.to(dtype) for one in factors())
    found = truncated_product(A, B, 4)
    assert found.A.dtype is found.B.dtype is torch.float32
    close(found.B @ found.A, B.float() @ A.float(), 1e-5)


def test_what_is_lost_is_exact_however_small() -> None:
    """Twelve orders of magnitude apart in float64, where the Gram matrix of the product would lose the small ones."""
    generator = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(40, 3, generator=generator, dtype=torch.float64)).Q
    P = torch.linalg.qr(torch.randn(30, 3, generator=generator, dtype=torch.float64)).Q
    S = torch.tensor([1.0, 1e-6, 1e-12], dtype=torch.float64)
    assert truncated_product(P.mT, Q * S, 1).lost == pytest.approx(1e-12, rel=1e-6)
    assert truncated_product(P.mT, Q * S, 2).lost == pytest.approx(1e-24, rel=1e-2)


@pytest.mark.parametrize("rank", [2, 0.9])
def test_rows_of_A_are_orthonormal_and_those_filled_up_are_zero(rank: int | float) -> None:
    A, B = factors()
    for found in (truncated_product(A, B, rank), truncated_matrix(B @ A, rank)):
        wider = found.at_least(found.rank + 2)
        close(found.A @ found.A.mT, torch.eye(found.rank, dtype=torch.float64))
        assert (wider.rank, wider.lost, wider.total) == (found.rank + 2, found.lost, found.total)
        close(wider.B @ wider.A, found.B @ found.A)


def test_a_large_matrix_of_noise_is_as_near_as_the_exact_decomposition() -> None:
    M = torch.randn(160, 140, generator=torch.Generator().manual_seed(5))
    exact = float((M.double() - best(M.double(), 2)).square().sum())
    found = truncated_matrix(M, 2)
    assert found.lost == pytest.approx(exact, rel=1e-5)
