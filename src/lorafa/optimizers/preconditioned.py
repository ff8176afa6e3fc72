"""Gradients of A and B changed together, before any stock optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lorafa.adapter import working_dtype
from lorafa.errors import ConfigError
from lorafa.optimizers.checked import check_pairs, check_state, explained
from lorafa.optimizers.pairs import Pair, by_shape

Transform = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A (N, r, n), B (N, m, r), their gradients, and s (N, 1, 1) -> the gradients to use instead."""


class PairBatch:
    """Pairs of one shape, stacked: A (N, r, n) and B (N, m, r), in float32 (float64 stays)."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.As, self.Bs = [pair.A for pair in pairs], [pair.B for pair in pairs]
        self.sizes = [pair.matrices_A(pair.A).shape[0] for pair in pairs]
        self.plain = all(
            pair.matrices_A(pair.A).shape[1:] == pair.A.shape and pair.matrices_B(pair.B).shape[1:] == pair.B.shape
            for pair in pairs
        )
        """Whether every factor is stored as the matrix it is."""

    def live(self) -> PairBatch | None:
        """The pairs both of whose factors have a gradient, None if there are none."""
        live = [A.grad is not None and B.grad is not None for A, B in zip(self.As, self.Bs, strict=True)]
        if all(live):
            return self
        return PairBatch(list(compress(self.pairs, live))) if any(live) else None

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._stacked(self.As, self.Bs)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._stacked([A.grad for A in self.As], [B.grad for B in self.Bs])  # type: ignore[misc]

    def scalings(self) -> Tensor:
        """s of every matrix, (N, 1, 1)."""
        each = [pair.scaling for pair, size in zip(self.pairs, self.sizes, strict=True) for _ in range(size)]
        dtype = working_dtype(self.Bs[0].dtype)
        return torch.tensor(each, dtype=dtype, device=self.Bs[0].device).view(-1, 1, 1)

    def split(self, for_A: Tensor, for_B: Tensor) -> Iterator[tuple[nn.Parameter, Tensor, nn.Parameter, Tensor]]:
        """Stacked matrices back to one pair each: A, what is for it, B, what is for it, in the stored shapes."""
        if self.plain:
            yield from zip(self.As, for_A.unbind(), self.Bs, for_B.unbind(), strict=True)
            return
        parts = zip(self.pairs, torch.split(for_A, self.sizes), torch.split(for_B, self.sizes), strict=True)
        for pair, part_A, part_B in parts:
            yield pair.A, pair.stored_A(part_A), pair.B, pair.stored_B(part_B)

    def _stacked(self, like_A: Sequence[Tensor], like_B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if self.plain:
            A, B = torch.stack(list(like_A)), torch.stack(list(like_B))
        else:
            A = torch.cat([pair.matrices_A(part) for pair, part in zip(self.pairs, like_A, strict=True)])
            B = torch.cat([pair.matrices_B(part) for pair, part in zip(self.pairs, like_B, strict=True)])
        return A.to(working_dtype(A.dtype)), B.to(working_dtype(B.dtype))


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """In the parameter's dtype and strides: the fused kernels of torch walk both by address."""
    gradient = gradient.to(parameter.dtype)
    if (gradient.is_contiguous() and parameter.is_contiguous()) or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def live_batches(batches: Sequence[PairBatch]) -> list[PairBatch]:
    """What has gradients now."""
    return [live for batch in batches if (live := batch.live()) is not None]


def precondition(optimizer: Optimizer, pairs: Sequence[Pair], transform: Transform) -> Optimizer:
    """Let ``optimizer`` step on transformed gradients of ``pairs``; returns it.

    ``.grad`` is replaced, not written into; pairs of which a factor has no gradient are left alone. The optimizer stays
    the stock one: its state, its schedule and its file are unchanged. Copying or unpickling it loses the transform.

    Raises:
        ConfigError: the optimizer computes gradients inside its step.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigError("LBFGS computes gradients inside its step, where they cannot be preconditioned. Use another.")
    batches = [PairBatch(group) for group in by_shape(pairs)]

    def hook(stepping: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ConfigError(
                "A closure computes gradients inside the step, where they cannot be preconditioned. Compute the loss "
                "and its gradients first, then call step() without arguments."
            )
        check_pairs(stepping, pairs)
        with torch.no_grad(), explained(pairs):
            for batch in live_batches(batches):
                found = transform(*batch.factors(), *batch.gradients(), batch.scalings())
                for A, for_A, B, for_B in batch.split(*found):
                    A.grad, B.grad = _laid_out_as(A, for_A), _laid_out_as(B, for_B)

    optimizer.register_step_pre_hook(hook)
    optimizer.register_load_state_dict_pre_hook(check_state)
    return optimizer
