"""LoraEmbedding: adapters on a lookup table, seen as a linear layer on one-hot vectors: W is (dim, vocabulary)."""

from __future__ import annotations

from torch import Tensor, nn

from lorafa.adapter import Adapter
from lorafa.backends.base import is_hooked
from lorafa.backends.offload import in_memory
from lorafa.layers.base import LoraLayer
from lorafa.numerics.fused import Keep


class LoraEmbedding(LoraLayer):
    """x holds indices (...), the output is (..., dim). Dropout of indices is not defined and not done."""

    kind = "embedding"
    peft_name = "lora.Embedding"
    is_table = True
    can_be_tied = True
    factor_names = ("lora_embedding_A", "lora_embedding_B")
    takes_dropout = False
    takes_bias = False

    def hold_factors(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        self.lora_embedding_A[name] = nn.Parameter(A)
        self.lora_embedding_B[name] = nn.Parameter(B)

    def as_made(self, adapter: Adapter) -> bool:
        return not is_hooked(self.lora_embedding_A) and super().as_made(adapter)

    def factor_A(self, name: str) -> Tensor:
        factor: Tensor = in_memory(self.lora_embedding_A)[name]
        return factor

    def factor_B(self, name: str) -> Tensor:
        factor: Tensor = in_memory(self.lora_embedding_B)[name]
        return factor

    def factor_bias(self, name: str) -> Tensor | None:
        return None

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float = 0.0, keep: Keep | None = None
    ) -> Tensor:
        base = self.get_base_layer()
        rows = nn.functional.embedding(x, A.T, getattr(base, "padding_idx", None))  # that row is not trained
        change = nn.functional.linear(rows, B) * scaling
        factor = getattr(base, "embed_scale", None)  # some models scale inside their embedding's forward
        return change if factor is None else change * factor
