"""torch.nn.MultiheadAttention: the stacked query, key and value projection, (3 dim, dim); out_proj is an nn.Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from lorafa.backends.base import Backend, replaced
from lorafa.backends.oddities import fixed, odd_storage, own_forward, own_methods, own_tensor


class AttentionBackend(Backend):
    host = "attention"

    weight_name = "in_proj_weight"
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        "forward": frozenset({"torch.nn.modules.activation.MultiheadAttention.forward"})
    }

    def serves(self, layer: nn.Module) -> str | None:
        """The updated weights stand in for those of the layer and of ``out_proj`` in each call: it has to read them."""
        attention = cast(nn.MultiheadAttention, layer)
        if not attention._qkv_same_embed_dim:
            return "with kdim or vdim other than embed_dim it keeps three separate projections; use equal dimensions"
        ends = ((layer, "in_proj_weight", self.stored_shape(layer)), (attention.out_proj, "weight", None))
        for end, name, shape in ends:
            odd = odd_storage(end, name, shape)
            if odd is None and own_tensor(end, name) is None:
                odd = f"its {name} is computed, and no other can stand in for it"
            if odd is not None:
                return odd if end is layer else f"of its out_proj, {odd}"
        return own_methods(layer, self.formula)

    def stored_shape(self, layer: nn.Module) -> tuple[int, ...]:
        dim = cast(nn.MultiheadAttention, layer).embed_dim
        return 3 * dim, dim

    def reads(self, layer: nn.Module) -> str | None:
        return None

    def merges(self, layer: nn.Module) -> str | None:
        """Hooks run around both; a forward of this very layer reads its old weight, wherever the new one is."""
        return fixed(layer, self.weight_name) or own_forward(layer, self.formula)

    def weight(self, layer: nn.Module) -> Tensor:
        return cast(Tensor, cast(nn.MultiheadAttention, layer).in_proj_weight)

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
