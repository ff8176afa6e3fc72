"""What our own quantized linear layers have in common: nothing dequantized is kept, not for backward either."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from lorafa.backends.base import Backend
from lorafa.backends.offload import hooked_as, in_memory, without_hooks
from lorafa.numerics.fused import Codes, frozen_linear

if TYPE_CHECKING:
    from typing_extensions import Self


class _Codes:
    """The weight of one layer, brought in where it rests elsewhere."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return cast(QuantizedLinear, in_memory(self.layer)).dequantize(dtype)


class QuantizedLinear(nn.Module):
    """Holds W (out, in) as codes; computes x W^T + b in the dtype of x."""

    exact: ClassVar[tuple[str, ...]] = ("scale",)
    """Buffers that stay in float32 when the model is cast: rounded, they would change every weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantize ``weight`` (out, in); ``bias`` (out,) stays as it is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quantize(weight.detach().float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> Self:
        return cls(layer.weight, layer.bias)

    @abstractmethod
    def quantize(self, weight: Tensor) -> None:
        """Register the buffers that stand for ``weight`` (out, in), which is in float32."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the layer computes with, (out, in)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype is not value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, _Codes(self), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedBackend(Backend):
    host = "linear"
    quantized = True
    layer_type: ClassVar[type[QuantizedLinear]]

    def serves(self, layer: nn.Module) -> str | None:
        return None

    def weight(self, layer: nn.Module) -> Tensor:
        return cast(QuantizedLinear, layer).dequantize()

    def codes(self, layer: nn.Module) -> Codes | None:
        return _Codes(layer)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        linear = cast(QuantizedLinear, layer)
        return linear.out_features, linear.in_features

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """Quantizes again: the merged weight is rounded anew to the codes of the layer."""
        new = cast(QuantizedLinear, without_hooks(in_memory(layer)))  # with the hooks and the mode of the layer
        new._buffers = {}
        new.quantize(weight.detach().float())
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return hooked_as(new, layer)

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return self.layer_type(weight, bias)
