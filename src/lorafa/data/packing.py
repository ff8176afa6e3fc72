"""Several samples in one row of a batch, so that little of it is padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collate
from lorafa.errors import shorten

POSITIONS = "positions_of_samples"
"""What a packed batch has beside ids, mask and labels: int64 (rows, longest), counted from 0 in each sample."""


@dataclass(frozen=True)
class Pack:
    """Samples one after another, in the place of one."""

    samples: tuple[Sample, ...]

    @property
    def input_ids(self) -> list[int]:
        return [token for sample in self.samples for token in sample.input_ids]

    @property
    def labels(self) -> list[int]:
        """The labels of the samples; none for a sample's first token, as the one before belongs to another."""
        return [label for sample in self.samples for label in (IGNORE, *sample.labels[1:])]

    @property
    def place(self) -> str:
        """Where the rows stand, for messages; an empty text where that is not known of all."""
        places = [sample.place for sample in self.samples]
        return shorten(places, 3) if all(places) else ""

    @property
    def positions(self) -> list[int]:
        """The place of each token in its sample."""
        return [place for sample in self.samples for place in range(len(sample.input_ids))]


class Packs(Sequence[Pack]):
    """All samples, each in one pack of at most ``capacity`` tokens; which go together depends on the lengths alone.

    The longest first, each goes to the fullest pack that has room for it (best fit decreasing).
    """

    def __init__(self, samples: Sequence[Sample], lengths: Sequence[int], capacity: int) -> None:
        self.samples = samples
        self._members = _best_fit(lengths, min(capacity, sum(lengths)))  # a table has a line for each token of it

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pack]: ...
    def __getitem__(self, index: int | slice) -> Pack | list[Pack]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return Pack(tuple(self.samples[place] for place in self._members[index]))


def _best_fit(lengths: Sequence[int], capacity: int) -> list[array[int]]:
    """The samples of each pack, by their numbers."""
    packs: list[array[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n: some pack has room for n more tokens
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        size = lengths[sample]
        fitting = rooms >> size
        if size <= capacity and fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            packs[pack].append(sample)
        else:
            pack, room = len(packs), max(capacity, size)
            packs.append(array("l", [sample]))
        if left := room - size:
            with_room[left].append(pack)
            rooms |= 1 << left
    return packs


@dataclass(frozen=True)
class PackCollator:
    """Packs, or samples, to a batch: as its collator makes one, and for packs ``POSITIONS`` besides."""

    collator: Collate

    def __call__(self, rows: Sequence[Pack | Sample]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        packed: Iterable[Pack] = [row for row in rows if isinstance(row, Pack)]
        if positions := [row.positions for row in packed]:
            longest = batch["input_ids"].shape[1]
            batch[POSITIONS] = torch.tensor([row + [0] * (longest - len(row)) for row in positions])
        return batch


def as_read(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A packed batch as models of transformers take it: they keep samples apart by positions that begin anew, where no
    mask says otherwise. A padding token is a sample of its own."""
    if POSITIONS not in batch:
        return batch
    rest = {name: tensor for name, tensor in batch.items() if name not in (POSITIONS, "attention_mask")}
    return rest | {"position_ids": batch[POSITIONS]}
