"""What products of thin factors say of themselves, against the dense matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafa.numerics.low_rank import (
    effective_rank,
    energy,
    leading_of_sum,
    left_vectors,
    padded,
    product_energy,
    product_inner,
    product_svd,
    product_values,
    stable_rank,
    subspace_similarity,
    to_rank,
)
from toys.compare import best, close

SHAPES = [(), (3,)]


def factors(*stack: int, m: int = 14, n: int = 9, r: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*stack, r, n, generator=generator, dtype=torch.float64)
    return A, torch.randn(*stack, m, r, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("stack", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_spectrum_of_a_product_is_that_of_the_dense_matrix(stack: tuple[int, ...], rank: int) -> None:
    A, B = factors(*stack, r=rank)
    dense, svd = B @ A, product_svd(A, B)
    values = torch.linalg.svdvals(dense)[..., : min(rank, 9)]
    close(svd.S, values)
    close(product_values(A, B), values)
    close(svd.product(), dense)
    eye = torch.eye(svd.S.shape[-1], dtype=torch.float64).expand(*stack, -1, -1)
    close(svd.U.mT @ svd.U, eye)
    close(svd.Vh @ svd.Vh.mT, eye)


def test_the_core_is_exact_to_the_last_digits() -> None:
    A, B = factors(m=300, n=200, r=16)
    dense, svd = B @ A, product_svd(A, B)
    assert float((svd.product() - dense).norm() / dense.norm()) < 3e-14
    assert energy(svd.S) == pytest.approx(float(dense.square().sum()), rel=3e-14)
    assert product_energy(A, B) == pytest.approx(float(dense.square().sum()), rel=3e-14)


def test_float32_factors_keep_their_digits() -> None:
    A, B = (factor.float() for factor in factors())
    close(product_values(A, B), torch.linalg.svdvals(B.double() @ A.double())[:4])


@pytest.mark.parametrize("stack", SHAPES)
def test_inner_product_is_that_of_the_dense_matrices(stack: tuple[int, ...]) -> None:
    (A, B), (A2, B2) = factors(*stack), factors(*stack, r=6, seed=1)
    close(product_inner(A, B, A2, B2), ((B @ A) * (B2 @ A2)).sum(dim=(-2, -1)))
    assert product_inner(A, B, A, B).sum().item() == pytest.approx(energy(product_values(A, B)))


def test_similarity_of_subspaces_is_the_formula_of_the_paper() -> None:
    M, N = factors(r=3)[1], factors(r=5, seed=1)[1]
    U, V = (torch.linalg.svd(one, full_matrices=False).U for one in (M, N))
    expected = torch.linalg.matrix_norm(U.mT @ V).square() / 3
    close(subspace_similarity(M, N), expected)
    close(subspace_similarity(N, M), expected)
    assert 0 < expected < 1


def test_similarity_of_equal_contained_orthogonal_and_empty_spaces() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    mixing = factors(m=3, n=3, r=3)[0]
    assert subspace_similarity(eye[:, :3], eye[:, :3] @ mixing).item() == pytest.approx(1)
    assert subspace_similarity(eye[:, :3], eye[:, :5]).item() == pytest.approx(1)
    assert subspace_similarity(eye[:, :3], eye[:, 3:]).item() == pytest.approx(0, abs=1e-15)
    assert subspace_similarity(eye[:, :3], 0 * eye).item() == 0


def test_directions_of_rounding_are_no_part_of_a_space() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    doubled = torch.cat([eye[:, :1], eye[:, :1] * (1 + 1e-16)], dim=1)
    assert subspace_similarity(doubled, eye[:, 1:]).item() == pytest.approx(0, abs=1e-15)
    assert subspace_similarity(doubled, eye[:, :1]).item() == pytest.approx(1)


def test_effective_and_stable_rank_of_known_spectra() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 2.0])).item() == pytest.approx(4)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(3)).item() == 0
    p = (0.8, 0.2)
    entropy = -sum(share * math.log(share) for share in p)
    assert effective_rank(torch.tensor(p).sqrt()).item() == pytest.approx(math.exp(entropy))
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])).item() == pytest.approx(1.5)
    assert stable_rank(torch.zeros(2)).item() == 0
    assert effective_rank(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist() == pytest.approx([2, 1])


@pytest.mark.parametrize(("m", "n"), [(30, 50), (50, 30), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_left_vectors_are_those_of_the_svd(m: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)
    U, expected = left_vectors(W), torch.linalg.svd(W.double(), full_matrices=False).U
    assert U.dtype is dtype
    assert U.shape == expected.shape
    cosines = (U.double().mT @ expected).abs()
    close(cosines.amax(0), torch.ones(min(m, n), dtype=torch.float64), 1e-5)
    close(cosines.amax(1), torch.ones(min(m, n), dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_left_vectors_of_what_is_not_there_are_left_out(dtype: torch.dtype, turned: bool) -> None:
    A, B = factors(r=3)
    W = (B @ A).to(dtype)
    assert left_vectors(W.mT if turned else W).shape[1] == 3
    assert left_vectors(torch.zeros(4, 6, dtype=dtype)).shape == (4, 0)


def heavy_tailed(m: int, n: int) -> Tensor:
    """A matrix with the slow decay of a weight: sigma_i = 1 / sqrt(i)."""
    generator = torch.Generator().manual_seed(1)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(s, k, generator=generator, dtype=torch.float64)).Q for s in (m, n))
    return U / torch.arange(1, k + 1).sqrt() @ V.mT


@pytest.mark.parametrize(("m", "n"), [(12, 20), (700, 500), (520, 900)])
def test_leading_triplets_of_a_sum_are_those_of_the_dense_matrix(m: int, n: int) -> None:
    W = heavy_tailed(m, n).float()
    A, B = (0.02 * factor.float() for factor in factors(m=m, n=n, r=4))
    found = leading_of_sum(W, A, B, 10, torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd((W + B @ A).double(), full_matrices=False)
    close(found.S, S[:10], 1e-5)
    assert (found.U.double() * U[:, :10]).sum(0).abs().min() > 0.9999
    assert (found.Vh.double() * Vh[:10]).sum(1).abs().min() > 0.9999
    close(found.product(), U[:, :10] * S[:10] @ Vh[:10], 5e-3)


def test_a_large_sum_is_neither_formed_nor_decomposed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    W = heavy_tailed(900, 700).float()
    A, B = (0.01 * factor.float() for factor in factors(m=900, n=700, r=4))
    decomposed: list[tuple[int, ...]] = []
    original = torch.linalg.svd

    def svd(matrix: Tensor, *args: object, **kwargs: object) -> object:
        decomposed.append(tuple(matrix.shape))
        return original(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    leading_of_sum(W, A, B, 10, torch.Generator().manual_seed(0))
    assert decomposed
    assert (900, 700) not in decomposed


def test_values_that_are_not_finite_are_refused() -> None:
    A, B = factors()
    W = torch.zeros(14, 9, dtype=torch.float64)
    for broken in ((W + math.nan, A, B), (W, A * math.inf, B), (W, A, B + math.nan)):
        with pytest.raises(ValueError, match="not finite"):
            leading_of_sum(*broken, 2, torch.Generator())


@pytest.mark.parametrize("stack", SHAPES)
def test_nearest_product_of_a_rank_is_the_truncated_svd(stack: tuple[int, ...]) -> None:
    A, B = factors(*stack)
    near_A, near_B, values = to_rank(A, B, 2)
    close(near_B @ near_A, best(B @ A, 2))
    close(torch.linalg.matrix_norm(B @ A - near_B @ near_A).square(), values[..., 2:].square().sum(-1))
    close(near_A @ near_A.mT, near_B.mT @ near_B)  # shared alike
    wide_A, wide_B, _ = to_rank(A, B, 20)
    assert wide_A.shape[-2] == wide_B.shape[-1] == 20
    close(wide_B @ wide_A, B @ A)


def test_padding_keeps_the_product_bit_for_bit() -> None:
    A, B = factors()
    more_A, more_B = padded(A, B, 7)
    assert (more_A.shape, more_B.shape) == ((7, 9), (14, 7))
    assert torch.equal(more_A[:4], A)
    assert torch.equal(more_B[:, :4], B)
    assert not more_A[4:].any()
    assert not more_B[:, 4:].any()
