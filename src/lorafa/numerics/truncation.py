"""An update as a product of fewer ranks: the best one there is, and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.numerics.linalg import NOISE_STEPS, SVD, fix_signs, float_matrix, full_svd, leading_svd


@dataclass(frozen=True)
class Truncated:
    """The product B A nearest to an update M (..., m, n) among those of its rank (Eckart and Young, 1936)."""

    A: Tensor
    """(..., r, n), orthonormal rows; rows of zeros where M has a lower rank and no more are known."""
    B: Tensor
    """(..., m, r)."""
    total: float
    """||M||_F^2, its energy, summed over all of a stack."""
    lost: float
    """||M - B A||_F^2."""

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def share(self) -> float:
        """What is lost of the energy, between 0 and 1; 0 of an update that is zero."""
        return self.lost / self.total if self.total else 0.0


def product_svd(A: Tensor, B: Tensor) -> SVD:
    """All singular triplets of B A for A (..., r, n) and B (..., m, r), without forming the product.

    With B = Q_B R_B and A^T = Q_A R_A the core R_B R_A^T is small, and its triplets give those of B A. Costs
    O((m + n) r^2). In float32, float64 where a factor is; at most min(m, n, r) triplets.
    """
    wide = torch.promote_types(A.dtype, B.dtype)
    Q_B, R_B = torch.linalg.qr(float_matrix(B.to(wide)))
    Q_A, R_A = torch.linalg.qr(float_matrix(A.to(wide)).mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    U, Vh = fix_signs(Q_B @ U, Vh @ Q_A.mT)
    return SVD(U, S, Vh)


def truncated_product(A: Tensor, B: Tensor, rank: int | float) -> Truncated:
    """B A for A (..., r, n) and B (..., m, r) at another rank.

    Args:
        rank: the rank, from 1 to min(m, n); a float is the share of the energy, in (0, 1], that the smallest rank that
            does is to keep.
    """
    svd = product_svd(A, B)
    energies = svd.S.double().square()
    total = float(energies.sum())
    wanted = rank if isinstance(rank, int) else rank_for(energies, rank)
    kept = svd.at(slice(0, wanted))
    return _balanced(kept, wanted, total, float(energies[..., wanted:].sum()))


def truncated_matrix(matrix: Tensor, rank: int | float) -> Truncated:
    """A dense (..., m, n) at a rank, as :func:`truncated_product`.

    Of a large matrix only the triplets that a whole ``rank`` asks for are computed, by a block Krylov method whose
    rest is within 1e-5 of the least possible; a share needs all of them.
    """
    M = float_matrix(matrix)
    total = float(M.double().square().sum())
    if isinstance(rank, int):
        svd = leading_svd(M, rank, torch.Generator().manual_seed(0), steps=NOISE_STEPS)
        kept = svd.at(slice(0, rank))
        # a difference of squares would drown what is lost in rounding where next to nothing is
        lost = float((M - kept.product()).double().square().sum())
        return _balanced(kept, rank, total, lost)
    svd = full_svd(M)
    energies = svd.S.double().square()
    wanted = rank_for(energies, rank)
    return _balanced(svd.at(slice(0, wanted)), wanted, total, float(energies[..., wanted:].sum()))


def rank_for(energies: Tensor, share: float) -> int:
    """The least rank that keeps ``share`` of the energy of each matrix; of a zero matrix 1.

    Args:
        energies: squared singular values (..., k), falling.
        share: in (0, 1].
    """
    sums = energies.cumsum(-1)
    missing = (sums < share * sums[..., -1:]).sum(-1)
    return min(int(missing.max()) + 1, energies.shape[-1])


def _balanced(svd: SVD, rank: int, total: float, lost: float) -> Truncated:
    """A of orthonormal rows and B = U S, filled up with zeros to the rank."""
    short = rank - svd.S.shape[-1]
    A, B = svd.Vh, svd.U * svd.S[..., None, :]
    if short > 0:
        A, B = torch.nn.functional.pad(A, (0, 0, 0, short)), torch.nn.functional.pad(B, (0, short))
    return Truncated(A, B, total, lost)
