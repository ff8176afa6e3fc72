"""Low-rank products for parts of the rows of a batch, added to an output that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafa.numerics.fused import is_traced

MANY = 8
"""From so many places a row on, a product for each row costs less than bringing rows together, which copies them."""


def add_low_rank_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor) -> None:
    """Add s x A^T B^T to y in place, without gradients.

    Products are taken in the dtype of y; in that of A and B, if it is wider, where x has at most r rows: to convert the
    factors would cost the most there.

    Args:
        y: (rows, out).
        x: (rows, in), in the dtype of y.
        A: (r, in).
        B: (out, r).
    """
    if A.dtype is not y.dtype and x.shape[0] <= A.shape[0]:
        wide = torch.promote_types(y.dtype, A.dtype)
        change = nn.functional.linear(nn.functional.linear(x.to(wide), A.to(wide)), B.to(wide))
        y.add_(change.mul_(scaling))
        return
    z = x @ A.to(y.dtype).T
    if isinstance(scaling, Tensor):
        y.addmm_(z.mul_(scaling), B.to(y.dtype).T)
    else:
        y.addmm_(z, B.to(y.dtype).T, alpha=scaling)


class _Added(torch.autograd.Function):
    """y, which nobody else holds, with changes added to slices of its rows in place; nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Sequence[slice], *changes: Tensor) -> Tensor:
        ctx.places, ctx.dtypes = places, [change.dtype for change in changes]
        ctx.mark_dirty(y)
        for rows, change in zip(places, changes, strict=True):
            y[rows].add_(change)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        parts = zip(ctx.places, ctx.dtypes, needed, strict=True)
        return grad, None, *(grad[rows].to(dtype) if need else None for rows, dtype, need in parts)


def added(y: Tensor, places: Sequence[slice], changes: Sequence[Tensor], *, owned: bool) -> Tensor:
    """y with each change added to the slice of rows that is its place.

    Args:
        y: (rows, ...).
        places: slices of the rows of y; they may lie over each other.
        changes: of the shapes of these slices.
        owned: nobody else holds y or keeps it for backward, so that it may be changed.
    """
    if not changes:
        return y
    if is_traced():
        out = y
        for rows, change in zip(places, changes, strict=True):
            pad = [0, 0] * (y.dim() - 1) + [rows.start, y.shape[0] - rows.stop]
            out = out + nn.functional.pad(change.to(y.dtype), pad)
        return out
    return cast(Tensor, _Added.apply(y if owned else y.clone(), places, *changes))  # type: ignore[no-untyped-call]
