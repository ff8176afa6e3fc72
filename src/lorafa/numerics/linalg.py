"""Matrix decompositions: the only place with raw algorithms. Never in half precision, which LAPACK refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

_KRYLOV_STEPS = 8
"""Measured on SmolLM2-135M at rank 16: they capture 99.987 % of what the exact decomposition does, 99.77 % in the worst
of 210 layers (docs/LOG.md); weights decay slowly, statistics fast."""
NOISE_STEPS = 24
"""For matrices of noise, such as signs and what rounding lost, whose singular values lie close together: what is left
of one is within 1e-5 of the least possible (measured up to 3072 x 3072 at rank 8, where 8 steps leave 7e-5)."""
_SMALL = 128
"""Sides up to which a whole decomposition, or product, costs next to nothing."""
_EIGH_RANGE = {torch.float32: 1e-6, torch.float64: 0.03}
"""How much smaller than the largest a singular value may be to be taken from the eigenvalues of a Gram matrix, which is
computed in float64."""
_GRAM_BLOCKS = 4
"""More save hardly any products, and smaller ones are slower."""
_PROBES = 16
"""Gaussian vectors that a norm is estimated on."""
_NOTHING = 1e-30
"""Stands for an eigenvalue of zero where it is divided by."""


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of every column of U (..., m, k) positive, so that a decomposition reproduces."""
    rows = U.abs().argmax(dim=-2, keepdim=True)
    signs = torch.where(U.gather(-2, rows) < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs.transpose(-2, -1)


class SVD(NamedTuple):
    """Singular triplets of a matrix (..., m, n), the largest first."""

    U: Tensor
    """(..., m, k), orthonormal columns."""
    S: Tensor
    """(..., k), falling."""
    Vh: Tensor
    """(..., k, n), orthonormal rows."""

    def at(self, index: slice | Tensor) -> SVD:
        """Some of the triplets."""
        return SVD(self.U[..., index], self.S[..., index], self.Vh[..., index, :])

    def product(self) -> Tensor:
        """U diag(S) V^T, (..., m, n)."""
        return self.U * self.S[..., None, :] @ self.Vh


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype weights are computed in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is inf or nan, found without a mask of the tensor's size; True for whole numbers."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # torch compares no numbers of 8 bits
        values = values.to(torch.bfloat16)
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())  # both are nan if any value is


def float_matrix(matrix: Tensor) -> Tensor:
    """Detached, in its :func:`working_dtype`."""
    return matrix.detach().to(working_dtype(matrix.dtype))


def full_svd(matrix: Tensor, driver: str | None = None) -> SVD:
    """All min(m, n) singular triplets of (..., m, n) in float32 (float64 stays), with deterministic signs.

    Args:
        driver: of cuSOLVER, as for ``torch.linalg.svd``.
    """
    U, S, Vh = torch.linalg.svd(float_matrix(matrix), full_matrices=False, driver=driver)
    U, Vh = fix_signs(U, Vh)
    return SVD(U, S, Vh)


def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """The ``rank`` largest singular triplets of (..., m, n), exact. Costs O(m n min(m, n))."""
    return full_svd(matrix).at(slice(0, rank))


def leading_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, steps: int = _KRYLOV_STEPS, times: Tensor | None = None
) -> SVD:
    """The ``rank`` largest singular triplets of (..., m, n), by a block Krylov method where that is cheaper than exact.

    After q steps the basis spans X, (M M^T) X ... (M M^T)^q X for a random X (..., m, rank): Musco and Musco 2015,
    arXiv:1504.05477, algorithm 2. Costs O(q m n rank); exact where the basis would not be smaller than the matrix.

    Args:
        times: N (..., n, p): the triplets are those of the product with it, which is not formed.
    """
    M, N = float_matrix(matrix), None if times is None else float_matrix(times)
    columns, last = rank * (steps + 1), M.shape[-1] if N is None else N.shape[-1]
    if min(M.shape[-2], last) < max(2 * columns, _SMALL):
        return truncated_svd(M if N is None else M @ N, rank)

    def forth(block: Tensor) -> Tensor:
        return M @ (block if N is None else N @ block)

    def back(block: Tensor) -> Tensor:
        return M.mT @ block if N is None else N.mT @ (M.mT @ block)

    random = torch.randn(*M.shape[:-2], last, rank, generator=generator, dtype=M.dtype).to(M.device)
    block = torch.linalg.qr(forth(random)).Q
    blocks = [block]
    for _ in range(steps):
        block = torch.linalg.qr(forth(back(block))).Q
        blocks.append(block)
    Q = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q
    small = back(Q).mT
    values, vectors = torch.linalg.eigh(
        small.double() @ small.double().mT
    )  # a fifth of the time of an SVD of ``small``
    if bool((values[..., -rank] <= _EIGH_RANGE[M.dtype] ** 2 * values[..., -1]).any()):  # squares lose half the digits
        return svd_within(Q, small, rank)
    U, S = vectors[..., -rank:].flip(-1).to(M.dtype), values[..., -rank:].flip(-1).sqrt().to(M.dtype)
    U, Vh = fix_signs(Q @ U, U.mT @ small / S[..., None])
    return SVD(U, S, Vh)


def svd_within(basis: Tensor, small: Tensor, rank: int) -> SVD:
    """The ``rank`` largest singular triplets of Q Z, for orthonormal columns Q (..., m, k) and Z (..., k, n)."""
    U, S, Vh = torch.linalg.svd(small, full_matrices=False)
    U, Vh = fix_signs(basis @ U[..., :rank], Vh[..., :rank, :])
    return SVD(U, S[..., :rank], Vh)


def leading_qr(matrix: Tensor, rank: int, *, pivoted: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` columns of Q and rows of R in M = Q R, for M (..., m, n); only so many columns are decomposed.

    A Householder reflection depends on the columns up to its own, so these are the Q and R of all of M.

    Args:
        pivoted: begin with the columns that :func:`leading_columns` chooses. Their order is undone in R, whose chosen
            columns and not its first ones are triangular.

    Returns:
        Q (..., m, rank), R (..., rank, n), and (..., rank) the distance of each of the columns from those before it.
    """
    M = float_matrix(matrix)
    if pivoted:
        index = leading_columns(M, rank)[..., None, :].expand(*M.shape[:-1], rank)
        columns = M.gather(-1, index)
    else:
        columns = M[..., :rank]
    Q, R = torch.linalg.qr(columns)
    return Q, Q.mT @ M, R.diagonal(dim1=-2, dim2=-1).abs()


def leading_columns(matrix: Tensor, rank: int) -> Tensor:
    """Indices (..., rank) of the columns of (..., m, n) each of which is farthest from the span of those before it."""
    rest, chosen = float_matrix(matrix).clone(), []
    for _ in range(rank):
        lengths = torch.linalg.vector_norm(rest, dim=-2)
        column = lengths.argmax(dim=-1, keepdim=True)
        length = lengths.gather(-1, column)[..., None].clamp(min=_NOTHING)
        q = rest.gather(-1, column[..., None, :].expand(*rest.shape[:-1], 1)) / length
        rest -= q @ (q.mT @ rest)
        chosen.append(column)
    return torch.cat(chosen, dim=-1)


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
    """The matrix in float64, where the device has it (mps has not). Cheap for r x r; a copy of twice the size else."""
    return matrix if matrix.device.type == "mps" else matrix.double()


def damped_gram(gram: Tensor, damping: float, *, relative: bool) -> Tensor:
    """M + d I of positive semidefinite M (..., r, r), as :func:`wide`: positive definite, so that it has an inverse.

    d is ``damping``, or with ``relative`` ``damping`` times the mean eigenvalue of M; never less than what rounding
    made of M in its own dtype, nor than 1e-30.
    """
    M = wide(gram)
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    added = damping * trace / M.shape[-1] if relative else torch.full_like(trace, damping)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return M + (added + 4 * torch.finfo(gram.dtype).eps * trace + _NOTHING) * eye


def damped_inverse(gram: Tensor, damping: float, *, relative: bool) -> Tensor:
    """The inverse of :func:`damped_gram`. Where M is 0 and nothing damps it, what it is applied to is 0 there too."""
    return spd_inverse(torch.linalg.cholesky(damped_gram(gram, damping, relative=relative)))


def spd_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., r), rising, and eigenvectors (..., r, r) of positive semidefinite M, as :func:`wide`.

    None is below what rounding made of M in its own dtype, nor below 1e-30.
    """
    values, vectors = torch.linalg.eigh(wide(gram))
    rounding = torch.finfo(gram.dtype).eps * values[..., -1:].clamp(min=0) + _NOTHING
    return values.maximum(rounding), vectors


def exceeds(M: Tensor, bound: Tensor) -> Tensor:
    """Whether all eigenvalues of symmetric M (..., r, r) are above bound (...,): M - bound I has a Cholesky factor."""
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    info: Tensor = torch.linalg.cholesky_ex(M - bound[..., None, None] * eye).info
    return info == 0


def sylvester(S: Tensor, T: Tensor, right: Tensor) -> Tensor:
    """X of  S X + X T = right  for positive definite S and T, all (..., r, r): Smith, SIAM J. Appl. Math. 16, 1968.

    For any d > 0,  X = U X V + 2 d (S + d I)^-1 right (T + d I)^-1 = U X V + C  with  U = (S - d I) (S + d I)^-1  and V
    alike of T. Their eigenvalues are between -1 and 1, so X = C + U C V + U^2 C V^2 + ..., of which every turn doubles
    the number of terms. Four do where T is well conditioned, about log2 of the condition where neither side is.
    """
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    d = T.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    left, other = (spd_inverse(torch.linalg.cholesky(M + d * eye)) for M in (S, T))
    X, U, V = 2 * d * left @ right @ other, eye - 2 * d * left, eye - 2 * d * other
    # what is left out after the last turn is of the size of the square of this
    enough = math.sqrt(torch.finfo(S.dtype).eps)
    while bool((torch.linalg.matrix_norm(U) * torch.linalg.matrix_norm(V) > enough).any()):
        X, U, V = X + U @ X @ V, U @ U, V @ V
    return X + U @ X @ V


def leading_right(matrix: Tensor, rank: int, start: Tensor | None = None, steps: int = 0) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest singular values (rank,) of M (t, n) and their right vectors (rank, n).

    A direction M does not have (its singular value is rounding) is zero, and so is its value. Exact, O(min(t, n)^2
    max(t, n)), or by subspace iteration from a ``start``: O(t n p) a step.

    Args:
        start: (n, p), p > rank; the span of its columns is near that of the right vectors, or random. Not used where
            the smaller side of M is below 4 p.
        steps: each shrinks what is missing of direction i by (sigma_{p + 1} / sigma_i)^2.
    """
    M = float_matrix(matrix)
    if start is None or min(M.shape) < 4 * start.shape[1]:
        S, Vh = _right_svd(M)
    else:
        Q = torch.linalg.qr(start.to(M)).Q
        for _ in range(steps):
            Q = torch.linalg.qr(M.mT @ (M @ Q)).Q
        S, Wh = _right_svd(M @ Q)
        Vh = Wh @ Q.mT
    missing = max(rank - len(S), 0)
    S, Vh = S[:rank], Vh[:rank]
    return nn.functional.pad(S, (0, missing)), nn.functional.pad(Vh, (0, 0, 0, missing))


def top_right(A: Tensor, B: Tensor) -> Tensor:
    """The right singular vector (n,) of the largest singular value of B A, with A (r, n) and B (m, r); 0 where B A is.

    Exact: with B = Q R it is that of R A, which is small. Its sign is not defined.
    """
    core = torch.linalg.qr(float_matrix(B), mode="r").R @ float_matrix(A)
    return leading_right(core, 1)[1][0]


def _right_svd(M: Tensor) -> tuple[Tensor, Tensor]:
    """All singular values and right vectors of (t, n); by the smaller Gram matrix if there is a wider type for it."""
    W = wide(M)
    if W.dtype is M.dtype:
        _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        tall = W.shape[0] > W.shape[1]
        values, vectors = torch.linalg.eigh(W.mT @ W if tall else W @ W.mT)
        S, vectors = values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
        Vh = vectors.mT if tall else vectors.mT @ W / S.clamp(min=_NOTHING)[:, None]
    there = S.gt(S[0] * torch.finfo(M.dtype).eps * max(M.shape))
    return torch.where(there, S, 0).to(M.dtype), torch.where(there[:, None], Vh, 0).to(M.dtype)


def nystrom(Y: Tensor, Omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,), falling, and eigenvectors (n, k) of the Nystrom approximation Y (Omega^T Y)^+ Y^T of C (n, n).

    C is positive semidefinite and known by Y = C Omega for a random Omega (n, k) only: Tropp, Yurtsever, Udell and
    Cevher 2017, arXiv:1706.05736. The approximation is below C, equal to it if C has rank k or less, and otherwise the
    trace of the difference is at most (1 + r / (k - r - 1)) times the sum of the eigenvalues after the r-th on average,
    for any r < k - 1 (theorem 4.1).
    """
    core = wide(Omega).mT @ wide(Y)
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    there = values > values[-1].clamp(min=0) * torch.finfo(Y.dtype).eps * len(Y)  # the rest is rounding
    root = torch.where(there, values, 1).rsqrt() * there
    U, S, _ = torch.linalg.svd(wide(Y) @ (vectors * root), full_matrices=False)
    return S.square().to(Y.dtype), U.to(Y.dtype)


def add_gram(total: Tensor, X: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """total = beta total + alpha X^T X in place, on and above the diagonal alone: five eighths of the products of a
    large one.

    What is below is undefined; :func:`mirror_` fills it in at the end.

    Args:
        total: (n, n).
        X: (T, n).
    """
    for start, end in _bands(X.shape[1]):
        total[start:end, start:].addmm_(X[:, start:end].mT, X[:, start:], beta=beta, alpha=alpha)


def mirror_(total: Tensor) -> Tensor:
    """Make ``total`` (n, n) symmetric in place by what it has on and above its diagonal, and return it."""
    for start, end in _bands(len(total)):
        diagonal = total[start:end, start:end]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)
        total[end:, start:end] = total[start:end, end:].mT
    return total


def _bands(n: int) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each band of rows of an (n, n) matrix."""
    blocks = _GRAM_BLOCKS if n > _SMALL else 1
    return pairwise(n * block // blocks for block in range(blocks + 1))


def damped_until_invertible(gram: Tensor, damping: float, error: float) -> tuple[Tensor, Tensor]:
    """M + d I and its Cholesky factor, with the first d of ``damping``, 2 ``damping``, 4 ``damping`` ... mean
    eigenvalues for which || (M + d I) (M + d I)^-1 - I ||_F < ``error`` in M's dtype.

    The norm is estimated: that of the matrix times a Gaussian vector has the same mean square. Sixteen of them tell it
    to a fifth, and the whole inverse, which nobody else needs, is not made.

    Args:
        gram: positive semidefinite up to rounding, of positive trace, (n, n).
    """
    M = float_matrix(gram)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(M.shape[-1], _PROBES, generator=generator).to(M)
    unit = float(M.diagonal().mean())
    while True:
        damped = M.clone()
        damped.diagonal().add_(damping * unit)
        L, info = torch.linalg.cholesky_ex(damped)
        missed = damped @ torch.cholesky_solve(probes, L) - probes
        if not info and float(missed.norm()) / _PROBES**0.5 < error:
            return damped, L
        damping *= 2
