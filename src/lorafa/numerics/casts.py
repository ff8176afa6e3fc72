"""The factors of all layers in the dtype of products: one operation for a call of the model, instead of one a layer.

Which factors a call uses is known from the call before it. Their gradients come back in one operation too: in their own
dtype, and laid out as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_Place = tuple[torch.dtype, torch.device]


@dataclass(frozen=True, eq=False, slots=True)
class _Made:
    """A factor as it was, and what was made of it."""

    factor: Tensor
    made: Tensor
    version: int
    storage: int

    def is_of(self, factor: Tensor) -> bool:
        """Whether ``factor`` is still the same tensor with the same values: FSDP and offloading put others in it."""
        return factor._version == self.version and factor.untyped_storage()._cdata == self.storage


@dataclass(eq=False)
class Casts:
    """What one call of the model with gradients, and its backward pass, read in the place of factors.

    Args:
        expected: the factors that the call will ask for, with the dtype; a wrong guess costs an operation, no more.
    """

    expected: Mapping[int, tuple[weakref.ref[Tensor], torch.dtype]] = field(default_factory=dict)
    asked: dict[int, tuple[weakref.ref[Tensor], torch.dtype]] = field(default_factory=dict)
    """The factors it was asked for, which the next call can expect."""
    _made: dict[_Place, dict[int, _Made]] = field(default_factory=dict)

    def of(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """``factor`` in ``dtype`` with its gradient; itself, in its own, where it was not made with others."""
        if not torch.is_grad_enabled() or not _can_be_made(factor):
            return factor
        key, place = id(factor), (dtype, factor.device)
        if key not in self.asked:
            self.asked[key] = weakref.ref(factor), dtype
        if place not in self._made:
            self._made[place] = self._make(place)
        found = self._made[place].get(key)
        return found.made if found is not None and found.is_of(factor) else factor

    def _make(self, place: _Place) -> dict[int, _Made]:
        dtype, device = place
        known = [reference() for reference, wanted in self.expected.values() if wanted is dtype]
        factors = [f for f in known if f is not None and f.device == device and _can_be_made(f)]
        if len(factors) < 2:
            return {}
        in_backward = torch._C._current_graph_task_id() != -1  # layers run again: other parts of them will follow
        done = None if in_backward else weakref.WeakMethod(self.forget)
        made: Sequence[Tensor] = _InOneOperation.apply(dtype, done, *factors)  # type: ignore[no-untyped-call]
        return {
            id(f): _Made(f, m, f._version, f.untyped_storage()._cdata) for f, m in zip(factors, made, strict=True)
        }

    def forget(self) -> None:
        """Let go of what was made."""
        self._made.clear()


def _can_be_made(factor: Tensor) -> bool:
    """Whether it is a plain tensor that is in memory, and nobody waits for its gradient as soon as it is there."""
    return (
        type(factor) in (nn.Parameter, Tensor)
        and factor.is_leaf
        and factor.is_contiguous()
        and not (factor.is_meta or factor.is_inference() or factor._backward_hooks)
        and not getattr(factor, "_post_accumulate_grad_hooks", None)
        and factor.untyped_storage().nbytes() >= factor.nbytes > 0
    )


class _InOneOperation(torch.autograd.Function):
    """Factors of any shapes and dtypes on one device -> the same in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, done: weakref.WeakMethod[Any] | None, *factors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.done, ctx.dtypes = done, [factor.dtype for factor in factors]
        made = _copied(factors, [dtype] * len(factors))
        ctx.mark_non_differentiable(*(m for m, f in zip(made, factors, strict=True) if not f.requires_grad))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.done is not None and (forget := ctx.done()) is not None:
            forget()
        there = [place for place, grad in enumerate(grads) if grad is not None]
        copies = _copied([g for g in grads if g is not None], [ctx.dtypes[place] for place in there])
        own: dict[int, Tensor] = dict(zip(there, copies, strict=True))
        return None, None, *(own.get(place) for place in range(len(grads)))


def _copied(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each in its dtype and contiguous, by one operation for those that are not; the others share their memory."""
    made = [t.detach() for t in tensors]
    others = [i for i, (t, dtype) in enumerate(zip(tensors, dtypes, strict=True)) if _is_other(t, dtype)]
    for i in others:
        made[i] = torch.empty(tensors[i].shape, dtype=dtypes[i], device=tensors[i].device)
    if others:
        torch._foreach_copy_([made[i] for i in others], [tensors[i] for i in others])
    return made


def _is_other(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is not dtype or not tensor.is_contiguous()
