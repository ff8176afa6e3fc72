"""Pairs of one shape, stacked, so that one batched product does for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor, nn

from lorafa.errors import DivergedError
from lorafa.numerics.linalg import working_dtype
from lorafa.optimizers.pairs import Pair, by_shape, check_finite

CACHED_BYTES = 8 * 2**20
"""Largest size of a batch's factors on a CPU, so that a stack is still in the cache when it is multiplied."""


class Stack:
    """One factor of several pairs, or its gradients, as matrices (N, rows, columns), in float32 (float64 stays).

    Args:
        parameters: whose matrices have one shape.
        matrices: what makes (E, rows, columns) of each, `Pair.matrices_A` or `Pair.matrices_B`.
        stored: the inverses of ``matrices``.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        matrices: Sequence[Callable[[Tensor], Tensor]],
        stored: Sequence[Callable[[Tensor], Tensor]],
    ) -> None:
        self.parameters = list(parameters)
        self._matrices, self._stored = list(matrices), list(stored)
        shapes = [view(parameter).shape for parameter, view in zip(parameters, matrices, strict=True)]
        self.sizes = [shape[0] for shape in shapes]
        self._plain = all(s[1:] == parameter.shape for s, parameter in zip(shapes, parameters, strict=True))
        """Whether each is stored as the matrix it is."""

    @property
    def have_gradients(self) -> list[bool]:
        """Which of them have a gradient."""
        return [parameter.grad is not None for parameter in self.parameters]

    def values(self) -> Tensor:
        return self._stacked(self.parameters)

    def gradients(self) -> Tensor:
        """All of them must have one."""
        return self._stacked([parameter.grad for parameter in self.parameters])  # type: ignore[misc]

    def split(self, matrices: Tensor) -> Sequence[Tensor]:
        """(N, rows, columns) back to one tensor a parameter, in the stored shapes."""
        if self._plain:
            return matrices.unbind()
        parts = torch.split(matrices, self.sizes)
        return [store(part) for store, part in zip(self._stored, parts, strict=True)]

    def _stacked(self, like: Sequence[Tensor]) -> Tensor:
        if self._plain:
            stacked = torch.stack(list(like))
        else:
            stacked = torch.cat([view(each) for view, each in zip(self._matrices, like, strict=True)])
        return stacked.to(working_dtype(stacked.dtype))


class PairBatch:
    """Pairs of one shape: stacks of A (N, r, n) and of B (N, m, r)."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.A = Stack([p.A for p in pairs], [p.matrices_A for p in pairs], [p.stored_A for p in pairs])
        self.B = Stack([p.B for p in pairs], [p.matrices_B for p in pairs], [p.stored_B for p in pairs])

    def live(self) -> PairBatch | None:
        """The pairs both of whose factors have a gradient, None if there are none."""
        both = [A and B for A, B in zip(self.A.have_gradients, self.B.have_gradients, strict=True)]
        if all(both):
            return self
        return PairBatch(list(compress(self.pairs, both))) if any(both) else None

    def check_finite_gradients(self) -> None:
        """For steps that would lose more than a stock optimizer's by a gradient that is not finite; all have one.

        Raises:
            DivergedError: a gradient holds nan or inf.
            AdapterError: a factor itself does.
        """
        if bool((self.A.gradients().sum() + self.B.gradients().sum()).isfinite()):
            return
        for pair in self.pairs:  # one of them, unless the sum of finite ones was too large
            check_finite(pair)
            for factor, gradient in (("A", pair.A.grad), ("B", pair.B.grad)):
                if gradient is not None and not bool(gradient.isfinite().all()):
                    raise DivergedError(
                        f"{pair.path}, adapter {pair.name!r}: the gradient of {factor} holds nan or inf. Leave out the "
                        "batch whose loss is not finite; training in float16 takes torch.amp.GradScaler, which skips "
                        "such steps. Nothing was changed."
                    )

    def scalings(self) -> Tensor:
        """s of every matrix, (N, 1, 1)."""
        each = [pair.used_scaling() for pair, size in zip(self.pairs, self.B.sizes, strict=True) for _ in range(size)]
        B = self.B.parameters[0]
        return torch.tensor(each, dtype=working_dtype(B.dtype), device=B.device).view(-1, 1, 1)


def batches_of(pairs: Iterable[Pair]) -> list[PairBatch]:
    """All pairs in batches; on a CPU of at most ``CACHED_BYTES``, elsewhere as large as they get."""
    batches = []
    for group in by_shape(pairs):
        first = group[0]
        pair_bytes = (first.A.numel() + first.B.numel()) * working_dtype(first.B.dtype).itemsize
        most = max(1, CACHED_BYTES // pair_bytes) if first.B.device.type == "cpu" else len(group)
        batches += [PairBatch(group[start : start + most]) for start in range(0, len(group), most)]
    return batches


def live_batches(batches: Iterable[PairBatch]) -> list[PairBatch]:
    """What has gradients now."""
    return [live for batch in batches if (live := batch.live()) is not None]
