"""The logits of a model at the positions of a batch whose next label counts, and at no others where it can be cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.models.head_loss import HiddenStates, LogitTransform
from lorafa.models.rows import IGNORE_INDEX


def supervised(targets: Tensor) -> Tensor:
    """The positions of a batch (batch, tokens) that count, (positions,), as they follow each other in it."""
    return (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def states_at(states: Tensor, positions: Tensor) -> Tensor:
    """(positions, size) of the states (batch, tokens, size)."""
    return states.reshape(-1, states.shape[-1]).index_select(0, positions.to(states.device))


class Positions:
    """An objective of :func:`lorafa.models.head_loss.supervised_nll` that computes no loss: it keeps what the head
    reads at the positions that count, and the head itself; of the layers that are named what comes out of them too."""

    rows: Tensor
    """(positions, size)."""
    head: nn.Linear
    transform: LogitTransform
    inner: dict[int, Tensor]
    """(positions, size) after so many layers."""
    depth: int | None
    """The number of all layers, where some are named."""

    def __init__(self, layers: tuple[int, ...] = ()) -> None:
        self.layers = layers

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        self.head, self.transform, self.depth = states.head, states.transform, states.depth
        counted = supervised(targets)
        self.rows = states_at(states.last, counted)
        self.inner = {layer: states_at(state, counted) for layer, state in states.inner.items()}
        return states.last.new_zeros(()), len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def logits(self, chunk: slice = slice(None)) -> Tensor:
        """(positions of the chunk, vocabulary), in float32 at least."""
        weight, bias = self.head.weight, self.head.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self.transform.apply_(nn.functional.linear(self.rows[chunk].to(weight.dtype), weight, bias).to(wide))


def from_all_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The same, (positions, vocabulary) in the model's own number format, of a model that cannot be cut before its
    head."""
    inputs = dict(batch)
    counted = inputs.pop("labels")[:, 1:] != IGNORE_INDEX
    found: Tensor = model(**inputs, use_cache=False).logits[:, :-1][counted]
    return found
