"""A linear layer in 4 bits: blocks of 64 weights share a scale, codes index 16 levels (QLoRA, arXiv:2305.14314).

Plain PyTorch, so it runs on every device. Half a byte a weight plus 4 bytes a block; nothing dequantized is kept, not
for backward either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafa.backends.base import Backend

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK = 64


def normal_float_levels() -> Tensor:
    """The 16 levels in [-1, 1], (16,): quantiles of a normal variable, 8 above zero, 7 below, and zero (appendix E)."""
    edge = 0.9677083
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()


class _Nf4Product(torch.autograd.Function):
    """x W^T + b with W dequantized in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        return nn.functional.linear(x, layer.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad @ ctx.layer.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias


class NF4Linear(nn.Module):
    """Holds W (out, in) as NF4 codes; computes x W^T + b in the dtype of x."""

    levels: Tensor
    scale: Tensor
    codes: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantize ``weight`` (out, in); ``bias`` (out,) stays as it is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        levels = normal_float_levels().to(weight.device)
        blocks = nn.functional.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
        codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("scale", scale)
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> NF4Linear:
        return cls(layer.weight, layer.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the layer computes with, (out, in)."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], dim=1).view(-1, BLOCK).int()
        flat = (self.levels[codes] * self.scale).flatten()[: self.out_features * self.in_features]
        return flat.view(self.out_features, self.in_features).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casting the model leaves levels and scales in float32: rounded, they would change every weight."""
        exact = {name: self._buffers[name] for name in ("levels", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype is not value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Nf4Product.apply(x, self, self.bias))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Backend(Backend):
    host = "linear"

    def weight(self, layer: nn.Module) -> Tensor:
        return cast(NF4Linear, layer).dequantize()

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        nf4 = cast(NF4Linear, layer)
        return nf4.out_features, nf4.in_features

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """Quantizes again: the merged weight carries a new rounding to 4 bits."""
        return NF4Linear(weight, cast(NF4Linear, layer).bias if bias is None else bias)

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return NF4Linear(weight, bias)
