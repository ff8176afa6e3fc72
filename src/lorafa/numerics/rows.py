"""Low-rank products for parts of the rows of a batch, added to an output that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Stack:
    """The factors of several groups of rows, one group behind the other, for one product over all groups."""

    A: Tensor
    """(groups, in, ranks); the ranks that a group lacks are zeros."""
    B: Tensor
    """(groups, ranks, out), scaled."""


def stacked(groups: Sequence[Sequence[Product]]) -> Stack:
    """Copies of the factors of each group's changes, one change beside the other; a group may have none.

    At least one group has a change.
    """
    first, second, _ = next(product for products in groups for product in products)
    ranks = max(sum(A.shape[0] for A, _, _ in products) for products in groups)
    all_A = first.new_zeros(len(groups), first.shape[1], ranks)
    all_B = second.new_zeros(len(groups), ranks, second.shape[0])
    for own_A, own_B, products in zip(all_A, all_B, groups, strict=True):
        begin = 0
        for A, B, scaling in products:
            end = begin + A.shape[0]
            own_A[:, begin:end] = A.t()
            own_B[begin:end] = B.t() * scaling
            begin = end
    return Stack(all_A, all_B)


def add_stacked_(y: Tensor, x: Tensor, stack: Stack, gather: Tensor | None = None, back: Tensor | None = None) -> None:
    """Add to the rows of y the changes of their groups, in place, without gradients and in the factors' dtype.

    Args:
        y: (rows, ..., out).
        x: (rows, ..., in).
        gather: (groups, most), the rows of each group, filled up with any others; None where the rows lie in groups of
            one size, in order.
        back: (rows,), the place of each row in ``gather`` with its groups one after another.
    """
    groups, inputs, _ = stack.A.shape
    x = x.to(stack.A.dtype)
    if gather is None or back is None:
        change = x.reshape(groups, -1, inputs).bmm(stack.A).bmm(stack.B)
        y.add_(change.view(y.shape))
        return
    found = x.index_select(0, gather.flatten()).reshape(groups, -1, inputs).bmm(stack.A).bmm(stack.B)
    y.add_(found.view(-1, *y.shape[1:]).index_select(0, back))


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
