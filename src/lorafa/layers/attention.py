"""LoraAttention: adapters on the input and output projections of nn.MultiheadAttention.

That module multiplies with its weights inside one fused function, so the update is added to the weights for the length
of a forward pass. Both projections carry an adapter; that of out_proj sits inside the base layer, as in PEFT's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from lorafa.errors import ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.layers.weights import call_with, require_in_memory, updated_tensors


class LoraAttention(LoraLayer):
    """Arguments and results are nn.MultiheadAttention's. Dropout cannot act: there is no adapter input.

    nn.TransformerEncoderLayer reads ``in_proj_weight`` in evaluation instead of calling: it gets the updated one.
    """

    kind = "attention"
    peft_name = "lora.MultiheadAttention"
    changes_weight = True
    takes_dropout = False
    inner_layers = ("out_proj",)

    @classmethod
    def check(cls, name: str, base: nn.Module, rank: int, *, bias: bool, dropout: float) -> None:
        if bias and cast(nn.MultiheadAttention, base).in_proj_bias is None:
            raise ConfigError(
                f"{name}: lora_bias has nothing to act on in nn.MultiheadAttention(bias=False). Exclude it, or set "
                "lora_bias=False."
            )
        require_in_memory(name, base, cast(nn.MultiheadAttention, base).out_proj)
        super().check(name, base, rank, bias=bias, dropout=dropout)

    @property
    def in_proj_weight(self) -> Tensor:
        """(3 dim, dim), with the updates of the adapters that count."""
        if not self.counting():
            return self.running_base().in_proj_weight  # type: ignore[return-value]
        return updated_tensors(self, "weight")["weight"]

    @property
    def in_proj_bias(self) -> Tensor | None:
        """(3 dim,), with the biases of the adapters that count."""
        bias = cast("Tensor | None", self.running_base().in_proj_bias)
        change = None if bias is None else self.updated_bias(self.counting())
        return bias if change is None else change

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return True  # asked for by nn.TransformerEncoderLayer; others cannot carry an adapter

    def merged_base(self, names: Sequence[str]) -> nn.Module:
        require_in_memory(type(self).__name__, self.get_base_layer())
        return super().merged_base(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.counting():
            return self.running_base()(*args, **kwargs)
        # The base layer reads the weight of out_proj, which is that of a LoraLinear: the updated one.
        return call_with(self.base_layer, updated_tensors(self, "in_proj_weight", "in_proj_bias"), args, kwargs)
