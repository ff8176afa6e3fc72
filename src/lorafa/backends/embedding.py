"""torch.nn.Embedding: a table (vocabulary, dim), seen as the matrix (dim, vocabulary) of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorafa.backends.base import Backend, replaced
from lorafa.backends.oddities import changing_hooks, fixed, is_plain, own_forward, own_tensor, unsettled
from lorafa.backends.offload import in_memory, rests_elsewhere


def is_table(module: nn.Module) -> bool:
    """Whether the module looks up rows of its weight."""
    return isinstance(module, nn.Embedding)


class EmbeddingBackend(Backend):
    """A forward of its own may do no more than multiply the rows by ``embed_scale``, as Gemma's does in transformers:
    the update is then multiplied alike. Any other one looks up what cannot be known here."""

    host = "embedding"
    inherits = True
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        "forward": frozenset({"torch.nn.modules.sparse.Embedding.forward"})
    }

    def serves(self, layer: nn.Module) -> str | None:
        if getattr(layer, "max_norm", None) is not None:
            return (
                f"max_norm={layer.max_norm} makes every lookup renormalise the rows it reads in the table itself, so "
                "an update beside the table is not one of the table"
            )
        odd = self._own_lookup(layer) or changing_hooks(layer, outputs=False)
        return super().serves(layer) if odd is None else f"{odd}, so which rows it looks up is not known"

    def reads(self, layer: nn.Module) -> str | None:
        return self._own_lookup(layer) or changing_hooks(layer) or unsettled(layer, self.weight_name)

    def merges(self, layer: nn.Module) -> str | None:
        return fixed(layer, self.weight_name) or self._own_lookup(layer) or changing_hooks(layer)

    def _own_lookup(self, layer: nn.Module) -> str | None:
        """Why rows are not just looked up and scaled; where there is a scale the first and the last row are tried."""
        odd = own_forward(layer, self.formula)
        if odd is not None and rests_elsewhere(layer) and hasattr(layer, "embed_scale"):
            layer = in_memory(layer)  # without the hooks that bring the table in, and with its values
        table = own_tensor(layer, self.weight_name)
        if odd is None or "forward" in layer.__dict__ or not hasattr(layer, "embed_scale"):
            return odd
        if table is None or table.is_meta or not is_plain(table):
            return odd if table is None else None
        embedding: Any = layer
        if isinstance(embedding.embed_scale, Tensor) and embedding.embed_scale.is_meta:  # nor does it have a value here
            return None
        rows = torch.tensor([[0, len(table) - 1]], device=table.device)
        try:
            with torch.no_grad():
                found = type(embedding).forward(embedding, rows)
                wanted = table[rows] * embedding.embed_scale
                same = torch.allclose(found, wanted.to(found.dtype), rtol=1e-2, atol=0)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return odd
        return None if same else odd

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        embedding = cast(nn.Embedding, layer)
        return embedding.embedding_dim, embedding.num_embeddings

    def stored_shape(self, layer: nn.Module) -> tuple[int, ...]:
        return self.shape(layer)[::-1]

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
