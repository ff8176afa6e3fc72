"""The fused path of plain LoRA and DoRA: one autograd function for base product, low-rank product and gain.

    y = gain * (x W^T + s drop(x) A^T B^T) + bias            gain is 1 for LoRA, m / ||W + s B A|| for DoRA

What it keeps for backward, for T rows of x: x itself (as it came, never a copy in another dtype, and only if A or W is
trained), the (T, r) product, and with a gain the (T, out) output before it. No dropout mask is kept: it is drawn again
in backward (:mod:`lorafa.numerics.dropping`).

A frozen W may be kept as codes (:class:`Codes`): its values are made for each product and never kept.

Under torch.compile and torch.func the same formula is taken in plain operations, which those differentiate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafa.numerics.dropping import Dropping, Source, dropping


class Keep(Protocol):
    """What is kept of an input for the backward pass, and how the input is had back from it.

    The gradient of A is taken with what :meth:`load` gives: exact where that is the input, an approximation where less
    was kept (VeLoRA, arXiv:2405.17991).
    """

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is kept of an input (..., in) of any floating dtype."""

    def load(self, saved: tuple[Tensor, ...]) -> Tensor:
        """An input (..., in), as :meth:`save` was given it, or what stands for it."""


class _AsItIs:
    """Keeps the input itself, as it came, which costs nothing where something else holds it too."""

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def load(self, saved: tuple[Tensor, ...]) -> Tensor:
        return saved[0]


AS_IT_IS: Keep = _AsItIs()


class Codes(Protocol):
    """A frozen weight (out, in) in fewer bits than it computes in: its values are made anew for every product."""

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b as the layer that holds the codes computes it: a new tensor (..., out) in the dtype of x.

        Args:
            x: (..., in), any floating dtype.
            bias: (out,), any floating dtype.
        """

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, (out, in), rounded to ``dtype`` once."""


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


class Gain(NamedTuple):
    """A gain as outputs of some dtype are multiplied by it."""

    factor: Tensor
    """(out,), in that dtype."""
    less_one: bool
    """Whether the factor is what the gain is more than 1: gains lie near 1, where one in half precision would be off by
    as much as it changes anything."""

    @staticmethod
    def on(dtype: torch.dtype, gain: Tensor) -> Gain:
        """``gain``, (out,), for outputs in ``dtype``."""
        return Gain(gain, False) if gain.dtype is dtype else Gain((gain - 1).to(dtype), True)

    def times(self, y: Tensor) -> Tensor:
        """y times the gain, rounded once; a new tensor."""
        return torch.addcmul(y, y, self.factor) if self.less_one else y * self.factor

    def all_but(self, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """y, which has the bias, with the gain on the rest of it, and that rest. Changes y in place.

        y was rounded with its bias, once: at a gain of 1 it has its own bits.
        """
        rest = y - bias
        return y.addcmul_(rest, self.factor if self.less_one else self.factor - 1), rest


def _with_gain(y: Tensor, bias: Tensor | None, gain: Gain | None) -> tuple[Tensor, Tensor | None]:
    """y, which has the bias, after the gain; and what the gain was applied to. May change y in place."""
    if gain is None:
        return y, None
    return (gain.times(y), y) if bias is None else gain.all_but(y, bias)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """The dtype of every product is decided in forward; autocast would decide again, in backward otherwise."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def scaled_product(a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """scale * (a @ b) for matrices, a new tensor, in one operation where the factor is a number."""
    if isinstance(scale, Tensor):
        return (a @ b).mul_(scale)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)  # with beta=0 nothing is read of the first


def thin_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """grad^T z, (out, r), for rows of both: laid out as it is the fastest on the device."""
    return (z.T @ grad).T if grad.device.type == "cpu" else grad.T @ z


class _LowRankLinear(torch.autograd.Function):
    """x (..., in), weight (out, in) or None, bias (out,) or None, gain (out,) or None, A (r, in), B (out, r).

    ``codes`` stand in the place of ``weight``. Gives (rows of x, out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float | Tensor,
        drop: Dropping | None,
        dtype: torch.dtype,
        keep: Keep,
        codes: Codes | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropped, scale = rows, scaling
        if drop is not None:
            dropped, scale = drop.into(rows), scaling * drop.scale
        z = scaled_product(dropped, A.to(dtype).T, scale)
        inner_bias = None if bias is None else bias.to(dtype)
        if weight is None and codes is None:
            y = nn.functional.linear(z, B.to(dtype), inner_bias)
        else:
            y = base_product(rows, weight, codes, inner_bias)
            y.addmm_(z, B.to(dtype).T)
        times = None if gain is None else Gain.on(dtype, gain)
        y, before_gain = _with_gain(y, inner_bias, times)

        need_A, need_B = ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        need_weight = weight is not None and ctx.needs_input_grad[1]
        if need_weight:  # its gradient is exact, whatever is kept for that of A
            keep = AS_IT_IS
        ctx.keep, ctx.codes = keep, codes
        ctx.save_for_backward(
            weight,
            None if times is None else times.factor,
            A,
            B,
            z if need_B else None,
            before_gain if gain is not None and ctx.needs_input_grad[3] else None,
            *(keep.save(x) if need_A or need_weight else ()),
        )
        ctx.shape, ctx.dtype, ctx.scale, ctx.drop = x.shape, dtype, scale, drop
        ctx.dtypes = (x.dtype, *(None if tensor is None else tensor.dtype for tensor in (bias, gain)))
        ctx.less_one = times is not None and times.less_one
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, factor, A, B, z, before_gain, *kept = ctx.saved_tensors
    dtype, scale = ctx.dtype, ctx.scale
    x_dtype, bias_dtype, gain_dtype = ctx.dtypes
    need_x, need_weight, need_bias, need_gain, need_A, need_B = ctx.needs_input_grad[:6]
    grad = grad.reshape(-1, B.shape[0]).to(dtype)
    grad_bias = grad.sum(0).to(bias_dtype) if need_bias else None
    grad_gain = (grad * before_gain).sum(0, dtype=gain_dtype) if need_gain else None
    if factor is not None:
        grad = Gain(factor, ctx.less_one).times(grad)

    grad_x = grad_weight = grad_A = grad_B = None
    rows = ctx.keep.load(tuple(kept)).reshape(-1, ctx.shape[-1]).to(dtype) if kept else None
    if need_x or need_A:
        grad_z = scaled_product(grad, B.to(dtype), scale)
        through_A = grad_z @ A.to(dtype) if need_x else None
        dropped = rows if need_A else None
        if ctx.drop is not None:
            dropped, through_A = ctx.drop.again(dropped, through_A)
        if through_A is not None:  # the large product adds to the thin one: no pass over memory for the sum
            wide = ctx.codes.dense(dtype) if ctx.codes is not None else None if weight is None else weight.to(dtype)
            grad_x = through_A if wide is None else through_A.addmm_(grad, wide)
            grad_x = grad_x.view(ctx.shape).to(x_dtype)
        if dropped is not None:
            grad_A = (grad_z.T @ dropped).to(A.dtype)
    if need_B:
        grad_B = thin_gradient(z, grad).to(B.dtype, memory_format=torch.contiguous_format)
    if need_weight and rows is not None:
        grad_weight = (grad.T @ rows).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_gain, grad_A, grad_B, None, None, None, None, None


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for codes of W: nothing but them is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Codes, bias: Tensor | None) -> Tensor:
        ctx.codes = codes
        ctx.bias_dtype = None if bias is None else bias.dtype
        return codes.times(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad @ ctx.codes.dense(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias


def frozen_linear(x: Tensor, codes: Codes, bias: Tensor | None) -> Tensor:
    """x W^T + b, (..., out), with the gradients of x and b: the weight is dequantized in forward and in backward."""
    return cast(Tensor, _FrozenLinear.apply(x, codes, bias))  # type: ignore[no-untyped-call]


def base_product(x: Tensor, weight: Tensor | None, codes: Codes | None, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of x, a new tensor."""
    if codes is not None:
        return codes.times(x, bias)
    return nn.functional.linear(x, cast(Tensor, weight).to(x.dtype), bias)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, at a fifth of its time where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _of_few_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    dtype: torch.dtype,
    codes: Codes | None,
) -> Tensor:
    """The same for inference on at most r rows, as in generation, with factors of another dtype, usually float32.

    To convert and to scale them would cost the most there: the rows take on their dtype instead, and the sum the
    scaling.
    """
    x, linear = _as(x, dtype), nn.functional.linear
    wide = torch.promote_types(dtype, A.dtype)
    change = linear(linear(_as(x, wide), _as(A, wide)), _as(B, wide))
    inner_bias = None if bias is None else _as(bias, dtype)
    if weight is None and codes is None:
        y = _as(change.mul_(scaling), dtype)
        y = y if inner_bias is None else y.add_(inner_bias)
    else:
        y = base_product(x, weight, codes, inner_bias)
        y = y.add_(change.mul_(scaling)) if isinstance(scaling, Tensor) else y.add_(change, alpha=scaling)
    return _with_gain(y, inner_bias, None if gain is None else Gain.on(dtype, gain))[0]


def _learning_from_kept(x: Tensor, A: Tensor, p: float, keep: Keep) -> Tensor:
    """A drop(x), (..., r), with the gradient of A that what is kept of x gives, and that of x as it is."""
    with torch.no_grad():
        kept = keep.load(keep.save(x)).to(x.dtype)
    if p:
        mask = nn.functional.dropout(torch.ones_like(x), p)
        x, kept = x * mask, kept * mask
    seen = nn.functional.linear(kept, A)
    return nn.functional.linear(x, A.detach()) + (seen - seen.detach())


def _in_plain_operations(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    p: float,
    keep: Keep | None,
) -> Tensor:
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if keep is None or (weight is not None and weight.requires_grad):
        z = nn.functional.linear(nn.functional.dropout(x, p) if p else x, A.to(dtype))
    else:
        z = _learning_from_kept(x, A.to(dtype), p, keep)
    y = nn.functional.linear(z, B.to(dtype)) * scaling
    bias = None if bias is None else bias.to(dtype)
    if weight is not None:
        y = nn.functional.linear(x, weight.to(dtype), bias) + y
    elif bias is not None:
        y = y + bias
    if gain is None:
        return y
    times = Gain.on(dtype, gain)
    return times.times(y) if bias is None else torch.addcmul(y, y - bias, (gain - 1).to(dtype))


def low_rank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    *,
    weight: Tensor | Codes | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    source: Source | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """gain * (x W^T + s drop(x) A^T B^T) + bias, with the gradients of every tensor in it.

    Args:
        x: (..., in), any floating dtype, contiguous or not, empty or not. Products are taken in its dtype (under
            autocast, in autocast's), whatever the dtype of A and B; but those with A and B in theirs, if that is
            wider, where gradients are off and x has at most r rows: generating a token is rounded less than reading
            the same one in a prompt. Gradients come back in each tensor's own dtype.
        A: (r, in). If it does not require a gradient and neither does ``weight``, x is not kept for backward.
        B: (out, r).
        scaling: the factor s, a number or a tensor without dimensions, which gets no gradient.
        weight: (out, in), as numbers or as codes, which get no gradient; or None for the change alone.
        bias: (out,), added last.
        gain: (out,), one factor an output feature.
        dropout: probability in [0, 1) of zeroing an element of x before A.
        source: where the dropout comes from (:func:`lorafa.dropout_source`); None: what is chosen where it is called.
        keep: what is kept of x for the gradient of A; None keeps x as it came. Not used where ``weight`` requires a
            gradient.

    Returns:
        (..., out) in the dtype the products are taken in.

    Second derivatives raise: use torch.func or :func:`torch.compile`, where plain operations are used instead.
    """
    codes = weight if not isinstance(weight, Tensor) else None
    weight = weight if isinstance(weight, Tensor) else None
    if is_traced():
        dense = weight if codes is None else codes.dense(compute_dtype(x))
        return _in_plain_operations(x, dense, bias, gain, A, B, scaling, dropout, keep)
    dtype = compute_dtype(x)
    few = x.numel() <= A.shape[0] * x.shape[-1]
    with without_autocast(x):
        if few and dtype is not A.dtype and not dropout and not torch.is_grad_enabled():
            return _of_few_rows(x, weight, bias, gain, A, B, scaling, dtype, codes)
        drop = dropping(dropout, x.device, source) if dropout else None
        y: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, gain, A, B, scaling, drop, dtype, keep or AS_IT_IS, codes
        )
    return y.view(*x.shape[:-1], B.shape[0])  # out here: a view made inside could not be changed in place
