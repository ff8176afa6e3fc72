"""transformers Conv1D (GPT-2): a linear layer whose weight is stored as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafa.backends.base import Backend, is_plain, replaced


class Conv1DBackend(Backend):
    host = "linear"
    fan_in_fan_out = True
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        "forward": frozenset({"transformers.pytorch_utils.Conv1D.forward"})
    }

    def weight(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.T

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        return replaced(layer, weight=weight.T, bias=bias)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        conv: Any = layer
        return conv.nf, conv.nx

    def stored_shape(self, layer: nn.Module) -> tuple[int, ...]:
        return self.shape(layer)[::-1]

    def dense(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        conv: Any = layer
        return (conv.weight.T, conv.bias) if is_plain(conv.weight) and is_plain(conv.bias) else None

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return super().to_layout(layer, matrix).T

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        layer: nn.Module = Conv1D(*weight.shape)
        layer.weight = nn.Parameter(weight.T.contiguous())
        layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]) if bias is None else bias.clone())
        return layer
