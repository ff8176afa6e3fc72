"""torch.nn.Linear: weight stored as (out, in)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from lorafa.backends.base import Backend, is_plain, replaced


class DenseBackend(Backend):
    host = "linear"
    fan_in_fan_out = False
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        "forward": frozenset({
            "torch.nn.modules.linear.Linear.forward",
            "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
        })
    }  # fmt: skip

    def weight(self, layer: nn.Module) -> Tensor:
        return cast(nn.Linear, layer).weight

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        return replaced(layer, weight=weight, bias=bias)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        linear = cast(nn.Linear, layer)
        return linear.out_features, linear.in_features

    def stored_shape(self, layer: nn.Module) -> tuple[int, ...]:
        return self.shape(layer)

    def dense(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        linear = cast(nn.Linear, layer)
        if type(linear).forward is not nn.Linear.forward:
            return None
        weight, bias = linear.weight, linear.bias
        return (weight, bias) if is_plain(weight) and is_plain(bias) else None

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        out, in_ = weight.shape
        layer = nn.Linear(in_, out, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        return layer
