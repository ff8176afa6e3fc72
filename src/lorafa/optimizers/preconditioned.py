"""Gradients of A and B changed together, before any stock optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lorafa.errors import AdapterError, ConfigError
from lorafa.optimizers.batches import PairBatch, Stack, batches_of, live_batches
from lorafa.optimizers.checked import check_pairs, check_state, computing
from lorafa.optimizers.pairs import Pair

Transform = Callable[[PairBatch], tuple[Tensor, Tensor]]
"""Pairs with gradients -> the gradients to use instead, of A (N, r, n) and of B (N, m, r)."""


def _replace_gradients(stack: Stack, matrices: Tensor) -> None:
    """In the parameter's dtype and strides: the fused kernels of torch walk both by address."""
    gradients = stack.split(matrices.to(stack.parameters[0].dtype))
    for parameter, gradient in zip(stack.parameters, gradients, strict=True):
        packed = parameter.is_contiguous() and gradient.is_contiguous()
        if not packed and parameter.stride() != gradient.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient


class _Bound:
    """Refuses to be copied or pickled: torch leaves hooks behind, and the copy would step on the plain gradients."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AdapterError(
            f"This {type(self).__name__} reads the factors of one model before its step and cannot be copied or "
            "pickled. Keep its state_dict(), make the optimizer anew for the copy of the model, and load it there."
        )


def precondition(optimizer: Optimizer, pairs: Sequence[Pair], transform: Transform) -> Optimizer:
    """Let ``optimizer`` step on transformed gradients of ``pairs``; returns it.

    ``.grad`` is replaced, not written into; pairs of which a factor has no gradient are left alone. The optimizer stays
    the stock one: its state, its schedule and its file are unchanged. It can no longer be copied or pickled.

    Raises:
        ConfigError: the optimizer computes gradients inside its step.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "LBFGS computes gradients inside its step, where they cannot be preconditioned. Use torch.optim.AdamW, or "
            "another class whose step takes no closure."
        )
    batches = batches_of(pairs)

    def hook(stepping: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ConfigError(
                "A closure computes gradients inside the step, where they cannot be preconditioned. Compute the loss "
                "and its gradients first, then call step() without arguments."
            )
        check_pairs(stepping, pairs)
        with torch.no_grad(), computing(pairs):
            live = live_batches(batches)
            found = [transform(batch) for batch in live]  # all or none: a second try must not transform them twice
            for batch, (for_A, for_B) in zip(live, found, strict=True):
                _replace_gradients(batch.A, for_A)
                _replace_gradients(batch.B, for_B)

    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_Bound, kind), {"__module__": kind.__module__})
    optimizer.register_step_pre_hook(hook)
    optimizer.register_load_state_dict_pre_hook(check_state)
    return optimizer
