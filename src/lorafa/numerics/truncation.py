"""An update as a product of fewer ranks: the best one there is, and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafa.numerics.linalg import NOISE_STEPS, SVD, float_matrix, full_svd, leading_svd
from lorafa.numerics.low_rank import nearest_product, padded


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

    def at_least(self, rank: int) -> Truncated:
        """The same product with zeros in its factors up to a rank."""
        A, B = padded(self.A, self.B, rank)
        return replace(self, A=A, B=B)


def truncated_product(A: Tensor, B: Tensor, rank: int | float) -> Truncated:
    """B A for A (..., r, n) and B (..., m, r) of one dtype at another rank; in float32, or float64 where they are.

    Args:
        rank: the rank, from 1 to min(m, n); a float is the share of the energy, in (0, 1], that the smallest rank that
            does is to keep.
    """
    Vh, US, S = nearest_product(A, B, rank if isinstance(rank, int) else A.shape[-2])
    energies = S.double().square()
    wanted = rank if isinstance(rank, int) else rank_for(energies, rank)
    lost = float(energies[..., wanted:].sum())
    return _filled_up(Vh[..., :wanted, :], US[..., :wanted], wanted, float(energies.sum()), lost)


def truncated_matrix(matrix: Tensor, rank: int | float) -> Truncated:
    """A dense (..., m, n) at a rank, as :func:`truncated_product`.

    Of a large matrix only the triplets that a whole ``rank`` asks for are computed, by a block Krylov method whose
    rest is within 1e-5 of the least possible; a share needs all of them.
    """
    M = float_matrix(matrix)
    total = float(M.double().square().sum())
    if isinstance(rank, int):
        svd = leading_svd(M, rank, torch.Generator().manual_seed(0), steps=NOISE_STEPS)
        # a difference of squares would drown what is lost in rounding where next to nothing is
        lost = float((M - svd.at(slice(0, rank)).product()).double().square().sum())
        return _of_svd(svd, rank, total, lost)
    svd = full_svd(M)
    energies = svd.S.double().square()
    wanted = rank_for(energies, rank)
    return _of_svd(svd, wanted, total, float(energies[..., wanted:].sum()))


def rank_for(energies: Tensor, share: float) -> int:
    """The least rank that keeps ``share`` of the energy of each matrix; of a zero matrix 1.

    Args:
        energies: squared singular values (..., k), falling.
        share: in (0, 1].
    """
    sums = energies.cumsum(-1)
    missing = (sums < share * sums[..., -1:]).sum(-1)
    return min(int(missing.max()) + 1, energies.shape[-1])


def _of_svd(svd: SVD, rank: int, total: float, lost: float) -> Truncated:
    """A of orthonormal rows and B = U S."""
    kept = svd.at(slice(0, rank))
    return _filled_up(kept.Vh, kept.U * kept.S[..., None, :], rank, total, lost)


def _filled_up(A: Tensor, B: Tensor, rank: int, total: float, lost: float) -> Truncated:
    return Truncated(*padded(A, B, rank), total, lost)
