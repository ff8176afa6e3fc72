"""LoraAttention: adapters on the input and output projections of nn.MultiheadAttention.

That module multiplies with its weights inside one fused function, so the update is added to the weights for the length
of a forward pass. Both projections carry an adapter; that of out_proj sits inside the base layer, as in PEFT's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.func import functional_call

from lorafa.errors import ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.layers.weights import require_in_memory, updated_tensors

if TYPE_CHECKING:
    from lorafa.config import LoraConfig


class LoraAttention(LoraLayer):
    """Arguments and results are nn.MultiheadAttention's. Dropout cannot act: there is no adapter input."""

    kind = "attention"
    takes_dropout = False
    inner_layers = ("out_proj",)
    _READ_BY_CALLERS = frozenset({
        "embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn",
        "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj",
    })  # fmt: skip
    _qkv_same_embed_dim = False
    """Not as in the base layer: where it is True, nn.TransformerEncoderLayer reads the weights and never calls this."""

    @classmethod
    def check(cls, name: str, base: nn.Module, rank: int, config: LoraConfig) -> None:
        if config.lora_bias and cast(nn.MultiheadAttention, base).in_proj_bias is None:
            raise ConfigError(
                f"{name}: lora_bias has nothing to act on in nn.MultiheadAttention(bias=False). Exclude it, or set "
                "lora_bias=False."
            )
        require_in_memory(name, base, cast(nn.MultiheadAttention, base).out_proj)
        super().check(name, base, rank, config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base_layer, name) if name in self._READ_BY_CALLERS else super().__getattr__(name)

    def merged_base(self, names: Sequence[str]) -> nn.Module:
        require_in_memory(type(self).__name__, self.get_base_layer())
        return super().merged_base(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.counting():
            return self.running_base()(*args, **kwargs)
        tensors = updated_tensors(self, "in_proj_weight", "in_proj_bias")
        out_proj: nn.Module = self.base_layer.out_proj  # type: ignore[assignment]
        if isinstance(out_proj, LoraLayer) and out_proj.counting():
            tensors |= updated_tensors(out_proj, "out_proj.base_layer.weight", "out_proj.base_layer.bias")
        return functional_call(self.base_layer, tensors, args, kwargs)
