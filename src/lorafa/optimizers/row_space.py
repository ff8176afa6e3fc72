"""The gradient of the weight, as far as a frozen A lets B follow it (LoRA-FA, arXiv:2308.03303).

With A fixed, s B' A can only move the weight within the rows of A. The step of B that comes nearest to the gradient G
of the weight solves  min || s g A - G ||_F :

    g = (1/s) G A^T (A A^T)^-1 = (1/s^2) g_B (A A^T)^-1,        s g A = G P_A,

where g_B = s G A^T is what autograd puts into B.grad and P_A = A^T (A A^T)^-1 A projects onto the rows of A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafa.adapter import working_dtype
from lorafa.errors import AdapterError
from lorafa.linalg import gram_cholesky, spd_inverse
from lorafa.optimizers.pairs import Pair, by_shape

SMALLEST_PIVOT = 1e-6
"""Of A's triangular factor over its largest one; below it the rows of A count as dependent."""


def row_factors(pair: Pair) -> Tensor:
    """L (E, r, r) with L L^T = A A^T, lower triangular, in float64 on the CPU.

    Raises:
        AdapterError: the rows of A are dependent.
    """
    L, ratio = gram_cholesky(pair.matrices_A(pair.A).cpu())
    if bool((ratio < SMALLEST_PIVOT).any()):
        zero = not bool(pair.A.detach().any())
        kind = "is zero" if zero else "has dependent rows"
        raise AdapterError(
            f"{pair.path}, adapter {pair.name!r}: A {kind}, so a frozen A leaves B nothing, or less than its rank, to "
            "move the weight with. Make the adapter with LoraConfig(freeze_A=True), which starts every A, those of "
            "embeddings too, with independent rows; or choose a start with full rank. Nothing was changed."
        )
    return L


class RowSpace:
    """The projections of many pairs, decomposed once; A is looked at again only when it was written to.

    Args:
        pairs: layers whose A is frozen.

    Raises:
        AdapterError: the rows of some A are dependent.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self._batches = [_Batch(group) for group in by_shape(pairs)]

    @torch.no_grad()
    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """(1/s^2) g_B (A A^T)^-1 of every B that has a gradient, in B's stored shape, in float32 (float64 stays)."""
        found: dict[nn.Parameter, Tensor] = {}
        for batch in self._batches:
            batch.project(found)
        return found

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Frobenius norm of G P_A over all layers: the length of the gradient in weight space; a scalar tensor."""
        # || G P_A ||^2 = < s g A, G > = < g, s G A^T > = < g, g_B >
        found = self.gradients()
        if not found:
            return torch.zeros(())
        squares = [torch.sum(g * p.grad.to(g.dtype)) for p, g in found.items() if p.grad is not None]
        return torch.stack([square.to(squares[0].device) for square in squares]).sum().clamp(min=0).sqrt()

    @torch.no_grad()
    def clip_norm_(self, max_norm: float) -> Tensor:
        """Shorten the gradients of all B so that :meth:`norm` is at most ``max_norm``; returns what it was.

        As `torch.nn.utils.clip_grad_norm_`, but measured in weight space: the result does not depend on how A is
        scaled.
        """
        total = self.norm()
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for pair in self.pairs:
            if pair.B.grad is not None:
                pair.B.grad.mul_(factor.to(pair.B.grad.device, pair.B.grad.dtype))
        return total


class _Batch:
    """Pairs of one shape, with (1/s^2) (A A^T)^-1 of all of them in one tensor (N, r, r)."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self._parameters = [pair.B for pair in pairs]
        self._plain = all(pair.matrices_B(pair.B).shape[0] == 1 and pair.B.dim() == 2 for pair in pairs)
        self._As = [pair.A for pair in pairs]
        self._seen: list[tuple[int, int, float]] = [(-1, -1, math.nan)] * len(pairs)
        self._inverses: list[Tensor] = [torch.empty(0)] * len(pairs)
        self._stack = torch.empty(0)
        self._refresh()

    def _refresh(self) -> None:
        scalings = [pair.layer.scaling[pair.name] for pair in self.pairs]
        now = [(A.data_ptr(), A._version, s) for A, s in zip(self._As, scalings, strict=True)]
        if now == self._seen and self._stack.device == self._parameters[0].device:
            return
        for index, pair in enumerate(self.pairs):
            if now[index] != self._seen[index]:
                self._inverses[index] = spd_inverse(row_factors(pair)) / pair.scaling**2
        dtype = working_dtype(self._parameters[0].dtype)
        self._stack = torch.cat(self._inverses).to(self._parameters[0].device, dtype)
        self._seen = now

    def project(self, into: dict[nn.Parameter, Tensor]) -> None:
        self._refresh()
        grads = [parameter.grad for parameter in self._parameters]
        present = [index for index, grad in enumerate(grads) if grad is not None]
        inverses = self._stack
        if self._plain and present:
            if len(present) < len(grads):
                inverses = inverses[present]
            matrices = torch.stack([grad for grad in grads if grad is not None]).to(inverses.dtype)
            projected = torch.bmm(matrices, inverses).unbind()
            into.update(zip((self._parameters[index] for index in present), projected, strict=True))
            return
        starts = [0]
        for inverse in self._inverses:
            starts.append(starts[-1] + inverse.shape[0])
        for index in present:
            pair, grad = self.pairs[index], grads[index]
            matrix = pair.matrices_B(grad).to(inverses.dtype)  # type: ignore[arg-type]
            into[pair.B] = pair.stored_B(torch.bmm(matrix, inverses[starts[index] : starts[index + 1]]))
