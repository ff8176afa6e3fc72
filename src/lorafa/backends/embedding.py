"""torch.nn.Embedding: a table (vocabulary, dim), seen as the matrix (dim, vocabulary) of a linear layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lorafa.backends.base import Backend, replaced


class EmbeddingBackend(Backend):
    host = "embedding"

    def weight(self, layer: nn.Module) -> Tensor:
        return cast(nn.Embedding, layer).weight.T

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        return replaced(layer, weight=weight.T)

    def bias(self, layer: nn.Module) -> Tensor | None:
        return None

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return super().to_layout(layer, matrix).T

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        dim, vocabulary = weight.shape
        return nn.Embedding(vocabulary, dim, _weight=weight.T.contiguous())
