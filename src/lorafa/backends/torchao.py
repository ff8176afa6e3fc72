"""What the weights that torchao quantizes have in common: tensors of their own type in an ordinary nn.Linear.

torchao's product keeps the whole weight for backward, in the dtype of x. Here nothing is kept but the codes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorafa.backends.base import Backend
from lorafa.backends.oddities import own_methods
from lorafa.backends.offload import hooked_as, rests_elsewhere, without_hooks
from lorafa.numerics.fused import Codes

_ROUNDS_INPUTS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
"""Attributes of a tensor that change the inputs it is multiplied with, in one or another of the types."""


def weight_in(layer: nn.Module) -> Any:
    return layer._parameters["weight"]


class _Codes:
    def __init__(self, layer: nn.Module) -> None:
        self.weight = weight_in(layer)

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.weight.dtype  # some multiply in it alone
        y = nn.functional.linear(x.to(dtype), self.weight, None if bias is None else bias.to(dtype))
        return y.to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return cast(Tensor, self.weight.dequantize()).to(dtype)


class TorchaoBackend(Backend):
    host = "linear"
    quantized = True
    can_rest = False
    inherits = True
    formula: ClassVar[Mapping[str, frozenset[str]]] = {"forward": frozenset({"torch.nn.modules.linear.Linear.forward"})}

    @abstractmethod
    def quantize(self, weight: Tensor, like: Any) -> Any:
        """A weight (out, in) in float32 as a tensor of the type and with the settings of ``like``."""

    def serves(self, layer: nn.Module) -> str | None:
        weight = weight_in(layer)
        if not isinstance(layer, nn.Linear):
            return f"its weight is a {type(weight).__name__} of torchao, which is known in linear layers only"
        if rests_elsewhere(layer):
            return "its codes rest elsewhere and are brought in without their scales; keep it on a device (device_map)"
        if changed := [name for name in _ROUNDS_INPUTS if getattr(weight, name, None) is not None]:
            return (
                f"it rounds or scales its inputs too ({changed[0]}), and has no gradient then; quantize the weight "
                "alone, as Int8WeightOnlyConfig does"
            )
        return None

    def weight(self, layer: nn.Module) -> Tensor:
        return cast(Tensor, weight_in(layer).dequantize())

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        linear = cast(nn.Linear, layer)
        return linear.out_features, linear.in_features

    def codes(self, layer: nn.Module) -> Codes | None:
        return None if own_methods(layer, self.formula) else _Codes(layer)

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.to(self.dtype(layer))

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """Quantizes again, by the same settings: the merged weight is rounded anew to codes."""
        new, old = without_hooks(layer), weight_in(layer)
        codes = self.quantize(weight.detach().float().contiguous(), old)
        names, settings = codes.__tensor_flatten__()
        parts = {name: getattr(codes, name) for name in names}
        codes = type(codes).__tensor_unflatten__(parts, {**settings, "dtype": old.dtype}, codes.shape, codes.stride())
        new._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        if bias is not None:
            new._parameters["bias"] = nn.Parameter(bias.detach().to(old.dtype), requires_grad=False)
        return hooked_as(new, layer)

    @abstractmethod
    def config(self) -> Any:
        """torchao's own settings that quantize a layer to such a weight."""

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return quantized_linear(weight, bias, self.config())


def quantized_linear(weight: Tensor, bias: Tensor | None, config: Any) -> nn.Module:
    """A linear layer with a weight (out, in) that torchao has quantized by ``config``.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import quantize_

    out, in_ = weight.shape
    dtype = torch.float32 if weight.dtype is torch.float64 else weight.dtype
    layer = nn.Linear(in_, out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    quantize_(layer, config)
    return layer
