"""What a product B A of thin factors says of itself: spectrum, norms, angles; the (m, n) matrix is never formed.

A is (..., r, n), B is (..., m, r); leading dimensions are those of a stack.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorafa.numerics.linalg import SVD, fix_signs, float_matrix, full_svd, svd_within, wide

_OVERSAMPLING = 6
"""Columns of a block beside those that are asked for."""
_STEPS = 4
"""Products with the matrix and its transpose between two looks at what is missing."""
_MISSING = 1e-4
"""||M v - sigma u|| / sigma at which triplets are taken: the angle of a vector is that over its relative gap."""
_SMALL = 256
"""Sides up to which a whole decomposition costs next to nothing."""


def product_svd(A: Tensor, B: Tensor) -> SVD:
    """All min(m, n, r) singular triplets of B A, in float64 where the device has it; costs O((m + n) r^2).

    B = Q_B R_B and A^T = Q_A R_A give B A = Q_B (R_B R_A^T) Q_A^T, and the matrix in the middle is small.
    """
    (Q_B, core), Q_A = _core(A, B), torch.linalg.qr(wide(A.detach()).mT).Q
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    U, Vh = fix_signs(Q_B @ U, Vh @ Q_A.mT)
    return SVD(U, S, Vh)


def product_values(A: Tensor, B: Tensor) -> Tensor:
    """The min(m, n, r) singular values of B A, falling, as those of :func:`product_svd`."""
    values: Tensor = torch.linalg.svdvals(_core(A, B)[1])
    return values


def matrix_values(matrix: Tensor) -> Tensor:
    """All singular values (min(m, n),) of a matrix (m, n), falling.

    By the eigenvalues of the smaller Gram matrix in float64, which is a fraction of the work of an SVD and exact to
    1e-8 of the largest; a matrix in float64, and one on a device without it, as a whole.
    """
    M = float_matrix(matrix)
    W = wide(M)
    if W.dtype is M.dtype:
        own: Tensor = torch.linalg.svdvals(M)
        return own
    squares: Tensor = torch.linalg.eigvalsh(W @ W.mT if M.shape[0] <= M.shape[1] else W.mT @ W)
    return squares.clamp(min=0).sqrt().flip(-1)


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Q_B and R_B R_A^T."""
    Q, R = torch.linalg.qr(wide(B.detach()))
    return Q, R @ torch.linalg.qr(wide(A.detach()).mT, mode="r").R.mT


def nearest_product(A: Tensor, B: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest product of ``rank`` to B A, for A (..., r, n) and B (..., m, r), without forming any (m, n).

    With B = Q R and A^T = P T, the singular values of B A are those of R T^T = u S v^T, which is small, and its right
    vectors are P v. Costs O((m + n) r^2 + r^3): of Q and P only what is needed is made.

    Args:
        driver: of cuSOLVER, as for ``torch.linalg.svd``.

    Returns:
        V^T (..., k, n), U S (..., m, k) for k = min(rank, r, m, n), the largest first and the largest entry of every
        column of U S positive, and all min(r, m, n) singular values, falling.
    """
    B, A = float_matrix(B), float_matrix(A)
    R = torch.geqrf(B)[0].triu()[..., : min(B.shape[-2:]), :]
    reflectors, tau = torch.geqrf(A.mT)
    T = reflectors.triu()[..., : tau.shape[-1], :]
    S, vh = torch.linalg.svd(R @ T.mT, full_matrices=False, driver=driver)[1:]
    v = nn.functional.pad(vh[..., :rank, :].mT, (0, 0, 0, A.shape[-1] - vh.shape[-1]))
    V = torch.ormqr(reflectors, tau, v.contiguous())
    US, Vh = fix_signs(B @ (A @ V), V.mT)
    return Vh, US, S


def product_energy(A: Tensor, B: Tensor) -> float:
    """||B A||_F^2 for A (..., r, n) and B (..., m, r), summed over all products: <B^T B, A A^T>, in float64."""
    left, right = wide(B.detach()), wide(A.detach())
    return float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0))


def product_inner(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """<B A, B2 A2> = tr((B2^T B) (A A2^T)), (...); the two may have other ranks."""
    left = wide(B2.detach()).mT @ wide(B.detach())
    right = wide(A.detach()) @ wide(A2.detach()).mT
    return (left.mT * right).sum(dim=(-2, -1))


def subspace_similarity(one: Tensor, other: Tensor) -> Tensor:
    """phi = ||U^T V||_F^2 / min(i, j), (...), of orthonormal bases U (..., n, i), V (..., n, j) of two column spaces.

    Hu et al. 2021 (arXiv:2106.09685), section 7.2, equation 4: 1 where one space contains the other, 0 where they are
    orthogonal; of two random ones max(i, j) / n. A space of dimension 0 is similar to none: 0.

    Args:
        one, other: matrices (..., n, i) and (..., n, j); directions they have by rounding only are no part of the
            space.
    """
    U, i = _basis(one)
    V, j = _basis(other)
    shared = (U.mT @ V).square().sum(dim=(-2, -1))
    return shared / torch.minimum(i, j).clamp(min=1)


def _basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of (..., n, i), zero where the singular value is rounding, and how many are not."""
    M = wide(matrix.detach())
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    there = S.gt(S[..., :1] * torch.finfo(matrix.dtype).eps * max(M.shape[-2:]))
    return U * there[..., None, :], there.sum(-1)


def effective_rank(values: Tensor) -> Tensor:
    """exp(-sum p log p), (...), with p = sigma^2 / sum sigma^2 of singular values (..., k): how many directions share
    the energy. k for equal values, 1 for one, 0 for none.

    The effective rank of Roy and Vetterli (EUSIPCO 2007), who take sigma in the place of sigma^2: squares are shares of
    ||M||_F^2, so that a long tail of small values counts for less.
    """
    squares = values.square()
    total = squares.sum(-1, keepdim=True)
    p = squares / torch.where(total > 0, total, 1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0)


def stable_rank(values: Tensor) -> Tensor:
    """||M||_F^2 / ||M||_2^2, (...), of singular values (..., k), the largest first; 0 for a matrix of zeros."""
    largest = values[..., 0].square()
    return torch.where(largest > 0, values.square().sum(-1) / torch.where(largest > 0, largest, 1), 0)


def left_vectors(matrix: Tensor) -> Tensor:
    """All left singular vectors (m, k) of a matrix (m, n) as its columns, the last first where it is in float32.

    Those of singular values that are zero up to rounding are left out: any rotation of them would do as well. By the
    eigenvectors of the smaller Gram matrix in float64, which is a fraction of the work of an SVD; float64 itself, of
    which a Gram matrix would lose half the digits, by an SVD.
    """
    M = float_matrix(matrix)
    W = wide(M)
    if W.dtype is M.dtype:
        U, S, _ = torch.linalg.svd(M, full_matrices=False)
        kept: Tensor = U[:, S.gt(S[:1] * torch.finfo(S.dtype).eps * max(M.shape))]
        return kept
    rows_are_few = M.shape[0] <= M.shape[1]
    squares, vectors = torch.linalg.eigh(W @ W.mT if rows_are_few else W.mT @ W)
    there = squares > squares[-1:].clamp(min=0) * torch.finfo(W.dtype).eps * max(M.shape)
    vectors = vectors[:, there]
    own: Tensor = vectors if rows_are_few else W @ vectors / squares[there].sqrt()
    return own.to(M.dtype)


def leading_of_sum(W: Tensor, A: Tensor, B: Tensor, count: int, generator: torch.Generator) -> SVD:
    """The ``count`` largest singular triplets of W + B A, W (m, n), by products with W, B and A alone.

    A block Krylov method (Musco and Musco 2015, arXiv:1504.05477, algorithm 2), whose basis grows until
    ||M v - sigma u|| <= 1e-4 sigma for each triplet. Where it would grow to half of the smaller side, and for small
    matrices, the sum is formed and decomposed as a whole.

    Raises:
        ValueError: a value is not finite.
    """
    W, A, B = float_matrix(W), A.detach().to(W), B.detach().to(W)
    if not all(bool(part.isfinite().all()) for part in (W, A, B)):
        raise ValueError("a value is not finite")
    side = min(W.shape)
    block = min(count + _OVERSAMPLING, side)

    def forth(x: Tensor) -> Tensor:
        return W @ x + B @ (A @ x)

    def back(x: Tensor) -> Tensor:
        return W.mT @ x + A.mT @ (B.mT @ x)

    X = torch.randn(W.shape[1], block, generator=generator, dtype=W.dtype).to(W.device)
    blocks = [torch.linalg.qr(forth(X)).Q]
    while side > _SMALL and block * (len(blocks) + _STEPS) < side // 2:
        for _ in range(_STEPS):
            blocks.append(torch.linalg.qr(forth(back(blocks[-1]))).Q)
        basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
        found = svd_within(basis, back(basis).mT, count)
        missed = torch.linalg.vector_norm(forth(found.Vh.mT) - found.U * found.S, dim=0)
        if bool((missed <= _MISSING * found.S).all()):
            return found
    return full_svd(W + B @ A).at(slice(0, count))


def to_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest product of ``rank`` columns to B A, with its singular values shared by both factors alike.

    Returns:
        A (..., rank, n) and B (..., m, rank), in float64 where the device has it, of zeros beyond the rank that B A
        has, and all singular values of B A.
    """
    Vh, US, S = nearest_product(wide(A), wide(B), rank)
    roots = S[..., : Vh.shape[-2]].sqrt()
    shares = torch.where(roots > 0, roots, 1)
    return (*padded(roots[..., :, None] * Vh, US / shares[..., None, :], rank), S)


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors with rows and columns of zeros up to ``rank``; their product stays."""
    more = max(rank - A.shape[-2], 0)
    return nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))


def energy(values: Tensor) -> float:
    """The sum of the squares of singular values: ||M||_F^2."""
    return math.fsum(values.detach().double().square().flatten().tolist())
