"""The leading triplets of a matrix, and of a product that is not formed, against the whole decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafa.numerics.linalg import SVD, leading_svd

RANK = 6


def with_values(rows: int, columns: int, values: Tensor, dtype: torch.dtype) -> Tensor:
    k = len(values)
    U, V = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (rows, columns))
    return (U * values @ V.mT).to(dtype)


def found(matrix: Tensor, times: Tensor | None = None, steps: int = 6) -> SVD:
    return leading_svd(matrix, RANK, torch.Generator().manual_seed(0), steps, times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 4.0, 6.0, 9.0], ids=lambda s: f"1e-{s:g}")
def test_triplets_are_those_of_the_whole_decomposition(dtype: torch.dtype, spread: float) -> None:
    """Also where the last of them is many orders smaller than the first, down to the dtype's rounding."""
    values = torch.logspace(0, -spread, RANK, dtype=torch.float64)
    rest = values[-1] * 0.1 * torch.linspace(1, 0.1, 150, dtype=torch.float64)
    matrix = with_values(180, 160, torch.cat([values, rest])[:160], dtype)
    triplets = found(matrix)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(triplets.S.double(), values, rtol=1e-3, atol=50 * eps)
    identity = torch.eye(RANK, dtype=dtype)
    torch.testing.assert_close(triplets.U.mT @ triplets.U, identity, rtol=0, atol=1e3 * eps)
    expected = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = expected.U[:, :RANK] * expected.S[:RANK] @ expected.Vh[:RANK]
    assert float((triplets.product().double() - best).norm()) <= 0.02 * float(rest.norm()) + 100 * eps


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 60)], ids=str)
def test_a_product_is_decomposed_without_being_formed(shape: tuple[int, int]) -> None:
    out, in_ = shape
    values = torch.logspace(0, -5, min(shape), dtype=torch.float64)
    W, C = with_values(out, in_, values, torch.float64), with_values(in_, in_, values.new_ones(in_), torch.float64)
    both, formed = found(W, C), found(W @ C)
    torch.testing.assert_close(both.S, torch.linalg.svdvals(W @ C)[:RANK], rtol=1e-9, atol=0)
    torch.testing.assert_close(both.product(), formed.product(), rtol=0, atol=1e-8)


def test_nothing_but_zeros_has_triplets_of_zero() -> None:
    triplets = found(torch.zeros(200, 180), torch.zeros(180, 190))
    assert triplets.U.shape == (200, RANK)
    assert triplets.Vh.shape == (RANK, 190)
    assert not triplets.S.any()
