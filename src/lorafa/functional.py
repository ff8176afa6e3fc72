"""The fused path of plain LoRA and DoRA: one autograd function for base product, low-rank product and gain.

    y = gain * (x W^T + s drop(x) A^T B^T) + bias            gain is 1 for LoRA, m / ||W + s B A|| for DoRA

What it keeps for backward, for T rows of x: x itself (as it came, never a copy in another dtype, and only if A or W is
trained), the (T, r) product, and with a gain the (T, out) output before it. No dropout mask is kept: it is a hash of
(seed, position), drawn again in backward, equal on every device.

Under torch.compile and torch.func the same formula is taken in plain operations, which those differentiate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SIGNED_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEPS = 2**16  # resolution of the dropout probability


def _signed(value: int) -> int:
    """The 64-bit pattern ``value`` as the int64 that holds it."""
    return value - 2**64 if value >= 2**63 else value


_WEYL = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)
_ROUNDS = ((15, 0x21F0AAAD), (16, 0x735A2D97), (17, 0x2C1B3C6D))  # shift, odd factor


def draw_seed() -> int:
    """A seed from torch's CPU generator, so that manual_seed and activation checkpointing govern it."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def _split_mix(count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` int64 words of SplitMix64 (Steele et al. 2014, doi:10.1145/2714064.2660195) at counters 0..count-1."""
    h = torch.arange(count, dtype=torch.int64, device=device).mul_(_WEYL).add_(seed)
    h.bitwise_xor_((h >> 30).bitwise_and_(2**34 - 1)).mul_(_MIX1)  # >> is arithmetic: mask off the copied sign bits
    h.bitwise_xor_((h >> 27).bitwise_and_(2**37 - 1)).mul_(_MIX2)
    return h.bitwise_xor_((h >> 31).bitwise_and_(2**33 - 1))


def dropout_probability(p: float) -> float:
    """The probability that is used for ``p``: the nearest multiple of 2^-16 that is neither 0 nor 1."""
    return min(max(round(p * _STEPS), 1), _STEPS - 1) / _STEPS


def keep_mask(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    """int16 of ``shape``: all bits set where an element is kept, 0 where it is dropped (probability ``p``).

    A random word a row plus a random word a pair of columns, stirred in three rounds of 32-bit multiply and shift, give
    16 bits an element: a third of the time of a 64-bit hash an element, and a sixteenth of torch's dropout on a CPU.
    """
    columns = shape[-1]
    rows, words = shape[:-1].numel(), (columns + 1) // 2
    axes = _split_mix(rows + words, seed, device).to(torch.int32)
    h = axes[:rows, None] + axes[None, rows:]
    shifted = torch.empty_like(h)
    for bits, factor in _ROUNDS:
        torch.bitwise_right_shift(h, bits, out=shifted)
        h.mul_(factor).bitwise_xor_(shifted)
    lanes = h.view(torch.int16)
    threshold = round(dropout_probability(p) * _STEPS) - _STEPS // 2
    torch.ge(lanes, threshold, out=lanes)
    return lanes.neg_()[:, :columns].reshape(shape)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is set, 0 elsewhere; works on the bits, so it is exact and as fast as a copy."""
    bits = _SIGNED_BITS[x.element_size()]
    return x.view(bits).bitwise_and(mask.to(bits)).view(x.dtype)


def apply_mask_(x: Tensor, mask: Tensor) -> Tensor:
    """:func:`apply_mask` in place."""
    bits = _SIGNED_BITS[x.element_size()]
    x.view(bits).bitwise_and_(mask.to(bits))
    return x


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast takes products of x in, or None where it is off."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype products are taken in: autocast's if it is on for x's device, else x's own."""
    return autocast_dtype(x) or x.dtype


def is_traced() -> bool:
    """Whether torch.compile, torch.export, torch.jit or a torch.func transform is looking on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def _times(y: Tensor, gain: Tensor) -> Tensor:
    """y * gain, rounded once: gains lie near 1, where a half-precision gain would be off by as much as it changes y."""
    return torch.addcmul(y, y, (gain - 1).to(y.dtype))


def _without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """The dtype of every product is decided in forward; autocast would decide again, in backward otherwise."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _LowRankLinear(torch.autograd.Function):
    """x (..., in), weight (out, in) or None, bias (out,) or None, gain (out,) or None, A (r, in), B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        p: float,
        seed: int,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropped, scale = rows, scaling
        if p:
            dropped = apply_mask(rows, keep_mask(rows.shape, p, seed, x.device))
            scale = scaling / (1 - dropout_probability(p))
        z = dropped @ A.to(dtype).T
        if scale != 1:
            z.mul_(scale)
        inner_bias = bias if bias is None or gain is not None else bias.to(dtype)
        if weight is None:
            y = nn.functional.linear(z, B.to(dtype), None if gain is not None else inner_bias)
        else:
            y = nn.functional.linear(rows, weight.to(dtype), None if gain is not None else inner_bias)
            y.addmm_(z, B.to(dtype).T)
        before_gain = None
        if gain is not None:
            before_gain, y = y, _times(y, gain)
            if bias is not None:
                y.add_(bias.to(dtype))

        need_A, need_B = ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        need_weight = weight is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            weight,
            gain,
            A,
            B,
            z if need_B else None,
            before_gain if gain is not None and ctx.needs_input_grad[3] else None,
        )
        ctx.shape, ctx.dtype, ctx.scale, ctx.p, ctx.seed = x.shape, dtype, scale, p, seed
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        return y.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gain, A, B, z, before_gain = ctx.saved_tensors
    dtype, scale, p = ctx.dtype, ctx.scale, ctx.p
    x_dtype, bias_dtype = ctx.dtypes
    need_x, need_weight, need_bias, need_gain, need_A, need_B = ctx.needs_input_grad[:6]
    grad = grad.reshape(-1, B.shape[0]).to(dtype)
    grad_bias = grad.sum(0).to(bias_dtype) if need_bias else None
    grad_gain = (grad * before_gain).sum(0, dtype=gain.dtype) if need_gain else None
    if gain is not None:
        grad = _times(grad, gain)

    grad_z = None
    if need_x or need_A:
        grad_z = grad @ B.to(dtype)
        if scale != 1:
            grad_z.mul_(scale)
    rows = None if x is None else x.reshape(-1, ctx.shape[-1]).to(dtype)
    mask = None
    if p and (need_x or need_A):
        mask = keep_mask(torch.Size((grad.shape[0], ctx.shape[-1])), p, ctx.seed, grad.device)

    grad_x = grad_weight = grad_A = grad_B = None
    if need_x:
        low_A = A.to(dtype)
        if weight is None:
            grad_x = grad_z @ low_A
            grad_x = grad_x if mask is None else apply_mask_(grad_x, mask)
        else:
            grad_x = grad @ weight.to(dtype)
            if mask is None:
                grad_x.addmm_(grad_z, low_A)
            else:
                grad_x.add_(apply_mask_(grad_z @ low_A, mask))
        grad_x = grad_x.view(ctx.shape).to(x_dtype)
    if need_A:
        assert rows is not None
        assert grad_z is not None
        grad_A = (grad_z.T @ (rows if mask is None else apply_mask(rows, mask))).to(A.dtype)
    if need_B:
        grad_B = (grad.T @ z).to(B.dtype)
    if need_weight:
        assert rows is not None
        grad_weight = (grad.T @ rows).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_gain, grad_A, grad_B, None, None, None, None


def _in_plain_operations(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float,
) -> Tensor:
    dtype = compute_dtype(x)
    x = x.to(dtype)
    dropped = nn.functional.dropout(x, p) if p else x
    y = nn.functional.linear(nn.functional.linear(dropped, A.to(dtype)), B.to(dtype)) * scaling
    if weight is not None:
        y = nn.functional.linear(x, weight.to(dtype)) + y
    if gain is not None:
        y = _times(y, gain)
    return y if bias is None else y + bias.to(dtype)


def low_rank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """gain * (x W^T + s drop(x) A^T B^T) + bias, with the gradients of every tensor in it.

    Args:
        x: (..., in), any floating dtype, contiguous or not, empty or not. Products are taken in its dtype (under
            autocast, in autocast's), whatever the dtype of A and B; gradients come back in each tensor's own dtype.
        A: (r, in). If it does not require a gradient and neither does ``weight``, x is not kept for backward.
        B: (out, r).
        scaling: the factor s.
        weight: (out, in), or None for the change alone.
        bias: (out,), added last.
        gain: (out,), one factor an output feature.
        dropout: probability in [0, 1) of zeroing an element of x before A; rounded to a multiple of 2^-16.

    Returns:
        (..., out) in the dtype the products are taken in.

    Second derivatives raise: use torch.func or :func:`torch.compile`, where plain operations are used instead.
    """
    if is_traced():
        return _in_plain_operations(x, weight, bias, gain, A, B, scaling, dropout)
    seed, dtype = draw_seed() if dropout else 0, compute_dtype(x)
    with _without_autocast(x):
        y: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, gain, A, B, scaling, dropout, seed, dtype
        )
    return y
