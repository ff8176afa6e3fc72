"""The fused path of a norm over LoRA with dropout: base and change see the same dropped input (DoRA's own code).

    y = x W^T + b + (gain - 1) * (d W^T) + gain * (s d A^T B^T),    d = drop(x) / (1 - p),    gain = m / ||W + s B A||

which is gain * ((W + s B A) d) + b without dropout. What is kept for backward, for T rows of x: x as it came (only if A
is trained), the (T, r) product, and the (T, out) product of d with the base (only if the gain is trained). No mask, no
dropped copy of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafa.numerics.dropping import Dropping, Source, dropping
from lorafa.numerics.fused import (
    AS_IT_IS,
    Codes,
    Keep,
    base_product,
    compute_dtype,
    scaled_product,
    thin_gradient,
    without_autocast,
)


class _DroppedBase(torch.autograd.Function):
    """x (..., in), a frozen weight (out, in) or its codes, bias (out,) or None, gain (out,), A (r, in), B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        codes: Codes | None,
        bias: Tensor | None,
        gain: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float | Tensor,
        drop: Dropping,
        dtype: torch.dtype,
        keep: Keep,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropped, scale = drop.into(rows), scaling * drop.scale
        z = scaled_product(dropped, A.to(dtype).T, scale)
        y = base_product(rows, weight, codes, None if bias is None else bias.to(dtype))
        again = base_product(dropped, weight, codes, None)
        y.addcmul_(again, ((gain - 1) * drop.scale).to(dtype))
        y.addmm_(z, (B * gain[:, None]).to(dtype).T)
        need_gain, need_A, need_B = ctx.needs_input_grad[4:7]
        ctx.keep, ctx.codes = keep, codes
        ctx.save_for_backward(
            weight,
            gain,
            A,
            B,
            z if need_B or need_gain else None,
            again if need_gain else None,
            *(keep.save(x) if need_A else ()),
        )
        ctx.shape, ctx.dtype, ctx.scale, ctx.drop = x.shape, dtype, scale, drop
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, gain, A, B, z, again, *saved = ctx.saved_tensors
    dtype, (x_dtype, bias_dtype), drop = ctx.dtype, ctx.dtypes, ctx.drop
    need_x, _, _, need_bias, need_gain, need_A, need_B = ctx.needs_input_grad[:7]
    grad = grad.reshape(-1, B.shape[0]).to(dtype)
    grad_x = grad_A = grad_B = grad_gain = None
    grad_bias = grad.sum(0).to(bias_dtype) if need_bias else None
    if need_B or need_gain:
        through_z = thin_gradient(z, grad).to(gain.dtype)  # (out, r)
        if need_B:
            grad_B = (through_z * gain[:, None]).to(B.dtype, memory_format=torch.contiguous_format)
        if need_gain:
            grad_gain = (grad * again).sum(0, dtype=gain.dtype) * drop.scale + (through_z * B.to(gain.dtype)).sum(1)
    if need_x or need_A:
        grad_z = grad @ (B * (gain[:, None] * ctx.scale)).to(dtype)
        rows = ctx.keep.load(tuple(saved)).reshape(-1, ctx.shape[-1]).to(dtype) if need_A else None
        if need_x:
            wide = weight.to(dtype) if ctx.codes is None else ctx.codes.dense(dtype)
            grad_x = grad_z @ A.to(dtype)
            grad_x.addmm_(grad * ((gain - 1) * drop.scale).to(dtype), wide)
        dropped, grad_x = drop.again(rows, grad_x)
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad, wide).view(ctx.shape).to(x_dtype)
        if dropped is not None:
            grad_A = (grad_z.T @ dropped).to(A.dtype)
    return grad_x, None, None, grad_bias, grad_gain, grad_A, grad_B, None, None, None, None


def dropped_base_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    *,
    weight: Tensor | Codes,
    bias: Tensor | None,
    gain: Tensor,
    dropout: float,
    source: Source | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """x W^T + b + (gain - 1) * (d W^T) + gain * (s d A^T B^T), d = drop(x) / (1 - p), with gradients of all but W.

    Args:
        x: (..., in), any floating dtype; products are taken in its dtype (under autocast, in autocast's).
        A: (r, in). If it does not require a gradient x is not kept for backward.
        B: (out, r).
        scaling: the factor s, a number or a tensor without dimensions, which gets no gradient.
        weight: (out, in), frozen, as numbers or as codes.
        bias: (out,).
        gain: (out,), in float32 or float64.
        dropout: probability in (0, 1) of zeroing an element of x.
        source: where the dropout comes from (:func:`lorafa.dropout_source`); None: what is chosen where it is called.
        keep: what is kept of x for the gradient of A; None keeps x as it came.

    Returns:
        (..., out) in the dtype the products are taken in.

    Second derivatives raise.
    """
    dense, codes = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    dtype = compute_dtype(x)
    with without_autocast(x):
        y: Tensor = _DroppedBase.apply(  # type: ignore[no-untyped-call]
            x, dense, codes, bias, gain, A, B, scaling, dropping(dropout, x.device, source), dtype, keep or AS_IT_IS
        )
    return y.view(*x.shape[:-1], B.shape[0])
