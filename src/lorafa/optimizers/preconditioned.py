"""Gradients of A and B changed together, before any stock optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lorafa.adapter import working_dtype
from lorafa.errors import ConfigError
from lorafa.optimizers.checked import check_state_shapes
from lorafa.optimizers.pairs import Pair, by_shape, stacked

Transform = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A (N, r, n), B (N, m, r), their gradients, and s (N, 1, 1) -> the gradients to use instead."""


def precondition(optimizer: Optimizer, pairs: Sequence[Pair], transform: Transform) -> Optimizer:
    """Let ``optimizer`` step on transformed gradients of ``pairs``; returns it.

    ``.grad`` is replaced, not written into; pairs of which a factor has no gradient are left alone. The optimizer stays
    the stock one: its state, its schedule and its file are unchanged. Copying or unpickling it loses the transform.

    Raises:
        ConfigError: the optimizer computes gradients inside its step.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigError("LBFGS computes gradients inside its step, where they cannot be preconditioned. Use another.")
    groups = by_shape(pairs)

    def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ConfigError(
                "A closure computes gradients inside the step, where they cannot be preconditioned. Compute the loss "
                "and its gradients first, then call step() without arguments."
            )
        for pair in pairs:
            pair.check_active()
        for group in groups:
            live = [pair for pair in group if pair.A.grad is not None and pair.B.grad is not None]
            if live:
                with torch.no_grad():
                    put_gradients(live, *transform(*with_gradients(live)))

    optimizer.register_step_pre_hook(hook)
    optimizer.register_load_state_dict_pre_hook(check_state_shapes)
    return optimizer


def factors(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """A (N, r, n) and B (N, m, r) of pairs of one shape, in float32 (float64 stays)."""
    A = stacked([pair.matrices_A(pair.A) for pair in pairs])
    return A, stacked([pair.matrices_B(pair.B) for pair in pairs])


def scalings(pairs: Sequence[Pair], like: Tensor) -> Tensor:
    """s of every matrix, (N, 1, 1)."""
    each = [pair.scaling for pair in pairs for _ in range(pair.matrices_A(pair.A).shape[0])]
    return torch.tensor(each, dtype=working_dtype(like.dtype), device=like.device).view(-1, 1, 1)


def with_gradients(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a transform takes."""
    A, B = factors(pairs)
    gradient_A = stacked([pair.matrices_A(pair.A.grad) for pair in pairs])  # type: ignore[arg-type]
    gradient_B = stacked([pair.matrices_B(pair.B.grad) for pair in pairs])  # type: ignore[arg-type]
    return A, B, gradient_A, gradient_B, scalings(pairs, B)


def put_gradients(pairs: Sequence[Pair], gradient_A: Tensor, gradient_B: Tensor) -> None:
    for pair, A, B in split(pairs, gradient_A, gradient_B):
        pair.A.grad, pair.B.grad = A.to(pair.A.dtype), B.to(pair.B.dtype)


def split(pairs: Sequence[Pair], for_A: Tensor, for_B: Tensor) -> Iterator[tuple[Pair, Tensor, Tensor]]:
    """Stacked matrices back to one pair each, in the stored shapes."""
    start = 0
    for pair in pairs:
        end = start + pair.matrices_A(pair.A).shape[0]
        yield pair, pair.stored_A(for_A[start:end]), pair.stored_B(for_B[start:end])
        start = end
