"""transformers Conv1D (GPT-2): a linear layer whose weight is stored as (in, out)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorafa.backends.base import Backend, is_plain, replaced


class Conv1DBackend(Backend):
    host = "linear"
    fan_in_fan_out = True

    def weight(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.T

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        return replaced(layer, weight=weight.T, bias=bias)

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
