"""The gradient of the weight, as far as a frozen A lets B follow it (LoRA-FA, arXiv:2308.03303).

With A fixed, s B' A can only move the weight within the rows of A. The step of B that comes nearest to the gradient G
of the weight solves  min || s g A - G ||_F :

    g = (1/s) G A^T (A A^T)^-1 = (1/s^2) g_B (A A^T)^-1,        s g A = G P_A,

where g_B = s G A^T is what autograd puts into B.grad and P_A = A^T (A A^T)^-1 A projects onto the rows of A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress

import torch
from torch import Tensor, nn

from lorafa.adapter import full_precision
from lorafa.errors import AdapterError
from lorafa.numerics.linalg import gram_cholesky, spd_inverse, working_dtype
from lorafa.optimizers.batches import PairBatch, batches_of
from lorafa.optimizers.pairs import Pair, check_finite
from lorafa.settings.checks import check_number

SMALLEST_PIVOT = 1e-6
"""The smallest allowed ratio of the pivots of A's triangular factor to the largest; below it the rows of A count as
dependent."""


def row_factors(pair: Pair) -> Tensor:
    """L (E, r, r) with L L^T = A A^T, lower triangular, in float64 on the CPU.

    Raises:
        AdapterError: the rows of A are dependent or not finite.
    """
    check_finite(pair)
    matrices = pair.matrices_A(pair.A)
    rank, width = matrices.shape[-2:]
    if rank > width:
        raise AdapterError(
            f"{pair.path}, adapter {pair.name!r}: A has {rank} rows of {width} numbers, which are dependent. Lower the "
            "rank of this layer (rank_pattern). Nothing was changed."
        )
    L, ratio = gram_cholesky(matrices.cpu())
    if bool((ratio < SMALLEST_PIVOT).any()):
        where = f"{pair.path}, adapter {pair.name!r}: A"
        if not bool(pair.A.detach().any()):
            raise AdapterError(
                f"{where} is zero, so that a frozen A leaves B nothing to move the weight with. Make the adapter with "
                "LoraConfig(freeze_A=True), whose default start makes every A random, those of embeddings too. Nothing "
                "was changed."
            )
        raise AdapterError(
            f"{where} has dependent rows, so that a frozen A leaves B less than its rank to move the weight with. "
            "Choose a start whose A has full rank, which init_lora_weights='orthogonal' has not. Nothing was changed."
        )
    return L


class RowSpace:
    """The projections of many pairs, decomposed once; A is looked at again only when it was written to.

    Writes through ``A.data`` are not seen.

    Args:
        pairs: layers whose A is frozen.

    Raises:
        AdapterError: the rows of some A are dependent.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self._batches = [_Batch(batch) for batch in batches_of(pairs)]

    def projected(self) -> Iterator[tuple[Sequence[nn.Parameter], Sequence[Tensor]]]:
        """Some B that have a gradient, and their (1/s^2) g_B (A A^T)^-1, of the same shapes; then the next ones."""
        for batch in self._batches:  # what fails, fails before the first of them is used
            batch.refresh()
        for batch in self._batches:
            yield from batch.projected()

    @torch.no_grad()
    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """(1/s^2) g_B (A A^T)^-1 of every B that has a gradient, in B's stored shape, in float32 (float64 stays)."""
        return {B: g for Bs, gradients in self.projected() for B, g in zip(Bs, gradients, strict=True)}

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

        Raises:
            ConfigError: ``max_norm`` is no number >= 0.
        """
        check_number("max_norm", max_norm, "a number >= 0", 0, closed="[")
        total = self.norm()
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for pair in self.pairs:
            if pair.B.grad is not None:
                pair.B.grad.mul_(factor.to(pair.B.grad.device, pair.B.grad.dtype))
        return total


class _Batch:
    """Pairs of one shape, with (1/s^2) (A A^T)^-1 of all of them in one tensor (N, r, r)."""

    def __init__(self, batch: PairBatch) -> None:
        self.pairs, self._B = batch.pairs, batch.B
        self._sources = [(pair.A, pair.adapter) for pair in batch.pairs]
        self._seen: list[tuple[int, int, float]] = [(-1, -1, math.nan)] * len(self.pairs)
        self._inverses: list[Tensor] = [torch.empty(0)] * len(self.pairs)
        self._stack = torch.empty(0)
        self.refresh()

    def refresh(self) -> None:
        """Decompose what was written to since the last time.

        Raises:
            AdapterError: the rows of some A are dependent or not finite, or a scaling is 0.
        """
        now = [(A.data_ptr(), A._version, float(adapter.scaling)) for A, adapter in self._sources]
        if now == self._seen and self._stack.device == self._B.parameters[0].device:
            return
        for index, pair in enumerate(self.pairs):
            if now[index] != self._seen[index]:
                self._inverses[index] = spd_inverse(row_factors(pair)) / pair.used_scaling() ** 2
        self._stack = self._stacked(self._inverses)
        self._seen = now

    def _stacked(self, inverses: Iterable[Tensor]) -> Tensor:
        B = self._B.parameters[0]
        return torch.cat(list(inverses)).to(B.device, working_dtype(B.dtype))

    def projected(self) -> Iterator[tuple[Sequence[nn.Parameter], Sequence[Tensor]]]:
        with_gradient, B, inverses = self._B.have_gradients, self._B, self._stack
        if not all(with_gradient):
            if not any(with_gradient):
                return
            B = PairBatch(list(compress(self.pairs, with_gradient))).B
            inverses = self._stacked(compress(self._inverses, with_gradient))
        with full_precision(inverses):
            projected = B.split(torch.bmm(B.gradients(), inverses))
        yield B.parameters, projected
