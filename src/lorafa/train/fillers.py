"""Rows that are there a second time, so that the last round of batches is full in every process.

accelerate deals batches out by turns. Where those of an epoch end in the middle of a round, it fills the round up with
rows of the epoch's beginning. They would be trained, and measured, twice; here they are told apart and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lorafa.models.rows import IGNORE_INDEX
from lorafa.processes import rank, world_size


class Filler(dict[str, Any]):
    """A repeated row and nothing else. None of its labels counts: all processes call the model equally often."""


class Rounds:
    """Which rows of a trainer's batches are repeated ones.

    Args:
        accelerator: of the trainer; it knows whether the batch that runs is the last of its loader.
        rows: of the data set; None where it does not say.
        batch_size: of one process.
    """

    def __init__(self, accelerator: Any, rows: int | None, batch_size: int) -> None:
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.own: int | None = None
        """Rows of this process's last batch that are no repeated ones; None where nothing is filled up."""
        loader = accelerator.dataloader_config
        deals = not loader.split_batches and not loader.dispatch_batches and loader.even_batches
        if rows is not None and deals and accelerator.num_processes > 1:
            round_of_all = batch_size * world_size()
            last = rows % round_of_all or round_of_all
            self.own = min(max(last - rank() * batch_size, 0), batch_size)

    def own_of(self, batch: Mapping[str, Any]) -> int | None:
        """How many of the first rows of a batch count; None where all do."""
        labels = batch.get("labels")
        last = self.accelerator.gradient_state.end_of_dataloader
        if self.own is None or not last or not isinstance(labels, Tensor) or len(labels) != self.batch_size:
            return None
        return self.own if self.own < self.batch_size else None

    def trimmed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches without the repeated rows; one of nothing else becomes a :class:`Filler`."""
        for batch in batches:
            own = self.own_of(batch)
            if own is None:
                yield batch
            elif own:
                yield {name: value[:own] for name, value in batch.items()}
            else:
                row = {name: value[:1] for name, value in batch.items()}
                yield Filler(row, labels=row["labels"].new_full(row["labels"].shape, IGNORE_INDEX))

    def masked(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with as many rows, where no label of a repeated one counts."""
        own = self.own_of(batch)
        if own is None:
            return dict(batch)
        labels = batch["labels"].clone()
        labels[own:] = IGNORE_INDEX
        return {**batch, "labels": labels}
