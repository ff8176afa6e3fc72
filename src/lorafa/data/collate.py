"""Samples to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorafa.data.chat import IGNORE


class Tokenized(Protocol):
    """A row of a batch: token ids and labels of one length."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...


class Collate(Protocol):
    """Rows to a batch, as a model of some kind takes it."""

    def __call__(self, samples: Sequence[Tokenized]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` among others, int64, a row for each sample."""


@dataclass(frozen=True)
class Collator:
    """Right padding to the longest sample of the batch.

    ``pad_id`` may be a token that also occurs in the text (many tokenizers pad with the end-of-sequence token):
    ``attention_mask`` and ``labels`` go by position, never by id.
    """

    pad_id: int

    def __call__(self, samples: Sequence[Tokenized]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape (samples, longest)."""
        return {
            "input_ids": padded([sample.input_ids for sample in samples], self.pad_id),
            "attention_mask": padded([[1] * len(sample.input_ids) for sample in samples], 0),
            "labels": padded([sample.labels for sample in samples], IGNORE),
        }


def padded(rows: Sequence[list[int]], filler: int) -> Tensor:
    """int64 (rows, longest), filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
