"""torch.nn.MultiheadAttention: the stacked query, key and value projection, (3 dim, dim); out_proj is an nn.Linear."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lorafa.backends.base import Backend, replaced
from lorafa.errors import BackendError


class AttentionBackend(Backend):
    host = "attention"

    def weight(self, layer: nn.Module) -> Tensor:
        weight = cast(nn.MultiheadAttention, layer).in_proj_weight
        if weight is None:
            raise BackendError(
                "nn.MultiheadAttention with kdim or vdim other than embed_dim keeps three separate projections and "
                "cannot carry an adapter. Use equal dimensions, or exclude it with exclude_modules."
            )
        return weight

    def bias(self, layer: nn.Module) -> Tensor | None:
        return cast(nn.MultiheadAttention, layer).in_proj_bias

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        return replaced(layer, in_proj_weight=weight, in_proj_bias=bias)

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Needs weight (3 dim, dim)."""
        dim = weight.shape[1]
        layer = nn.MultiheadAttention(dim, 2, bias=bias is not None, batch_first=True, dtype=weight.dtype)
        layer.in_proj_weight = nn.Parameter(weight.clone())
        if bias is not None:
            layer.in_proj_bias = nn.Parameter(bias.clone())
        return layer
