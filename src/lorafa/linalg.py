"""Matrix decompositions: the only place with raw algorithms. Never in half precision (ALGORITHMS 0.2)."""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = 1e-30
"""Stands for an eigenvalue of zero where it is divided by."""


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of every column of U (..., m, k) positive, so that a decomposition reproduces."""
    rows = U.abs().argmax(dim=-2, keepdim=True)
    signs = torch.where(U.gather(-2, rows) < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs.transpose(-2, -1)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets of (..., m, n): U (..., m, r), S (..., r), Vh (..., r, n).

    Exact, in float32 (float64 stays), deterministic signs. Costs O(m n min(m, n)).
    """
    dtype = matrix.dtype if matrix.dtype is torch.float64 else torch.float32
    U, S, Vh = torch.linalg.svd(matrix.detach().to(dtype), full_matrices=False)
    U, Vh = fix_signs(U[..., :rank], Vh[..., :rank, :])
    return U, S[..., :rank], Vh


def gram_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L with L L^T = M M^T for M (..., r, n) of full row rank, and the share of M M^T that is left in its last rows.

    Returns:
        L (..., r, r), lower triangular, in float64, and (...,) the smallest pivot of L over the largest: 0 where the
        rows of M are dependent up to float64's rounding.
    """
    rows = matrix.detach().double()
    L, info = torch.linalg.cholesky_ex(rows @ rows.mT)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    ratio = pivots.amin(-1) / pivots.amax(-1).clamp(min=torch.finfo(torch.float64).tiny)
    return L, torch.where((info == 0) & ratio.isfinite(), ratio, 0.0)


def spd_inverse(L: Tensor) -> Tensor:
    """(L L^T)^-1 of a lower triangular L (..., r, r), in its dtype."""
    return torch.cholesky_inverse(L)


def wide(matrix: Tensor) -> Tensor:
    """In float64, where the device has it: for r x r matrices, which cost nothing."""
    return matrix if matrix.device.type == "mps" else matrix.double()


def damped_inverse(gram: Tensor, damping: float, *, relative: bool) -> Tensor:
    """(M + d I)^-1 of positive semidefinite M (..., r, r), as :func:`wide`.

    d is ``damping``, or with ``relative`` ``damping`` times the mean eigenvalue of M; never less than what rounding
    made of M in its own dtype. Where M is 0 and nothing damps it, the inverse is that of a matrix of size 1e-30: what
    it is applied to is 0 there too.
    """
    M = wide(gram)
    rank = M.shape[-1]
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    added = damping * trace / rank if relative else torch.full_like(trace, damping)
    eye = torch.eye(rank, dtype=M.dtype, device=M.device)
    return spd_inverse(torch.linalg.cholesky(M + (added + 4 * torch.finfo(gram.dtype).eps * trace + _NOTHING) * eye))


def spd_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., r), rising, and eigenvectors (..., r, r) of positive semidefinite M, as :func:`wide`.

    None is below what rounding made of M in its own dtype, nor below 1e-30.
    """
    values, vectors = torch.linalg.eigh(wide(gram))
    rounding = torch.finfo(gram.dtype).eps * values[..., -1:].clamp(min=0) + _NOTHING
    return values.maximum(rounding), vectors


def sylvester(p: Tensor, P: Tensor, q: Tensor, Q: Tensor, right: Tensor) -> Tensor:
    """X of  S X + X T = right  for S = P diag(p) P^T and T = Q diag(q) Q^T, both positive definite, (..., r, r)."""
    return P @ ((P.mT @ right @ Q) / (p[..., :, None] + q[..., None, :])) @ Q.mT
