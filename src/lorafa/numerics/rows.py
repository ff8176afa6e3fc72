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


Product = tuple[Tensor, Tensor, "float | Tensor"]
"""A (r, in), B (out, r) and s of a change s B A x."""


def add_low_rank_(y: Tensor, x: Tensor, sizes: Sequence[int], products: Sequence[Sequence[Product]]) -> None:
    """Add to each part of the rows of y the changes that are its own, in place and without gradients.

    Products are taken in the dtype of y; in that of A and B, if it is wider, where a part has at most r rows: there
    it would cost the most to convert the factors.

    Args:
        y: (rows, out).
        x: (rows, in), in the dtype of y.
        sizes: the rows of each part, one after another.
        products: of each part, none or several.
    """
    dtype = y.dtype
    parts = zip(torch.split(y, list(sizes)), torch.split(x, list(sizes)), products, strict=True)
    for own_y, own_x, changes in parts:
        for A, B, scaling in changes:
            if A.dtype is not dtype:
                if own_x.shape[0] <= A.shape[0]:
                    wide = torch.promote_types(dtype, A.dtype)
                    z = own_x.to(wide).mm(A.to(wide).t())
                    own_y.add_(z.mm(B.to(wide).t()).mul_(scaling))
                    continue
                A, B = A.to(dtype), B.to(dtype)
            z = own_x.mm(A.t())
            if isinstance(scaling, Tensor):
                own_y.addmm_(z.mul_(scaling), B.t())
            else:
                own_y.addmm_(z, B.t(), alpha=scaling)


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
