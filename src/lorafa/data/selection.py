"""Which records of which sources are trained on, and which are held out; they are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorafa.data.heldout import Overlap, check_enough, check_enough_beside, rows_of, shuffled
from lorafa.data.mixing import Numbers, mixed
from lorafa.data.records import Record, Records
from lorafa.data.shares import apportioned
from lorafa.data.source import ListedRecords, Source
from lorafa.errors import DataError

if TYPE_CHECKING:
    from lorafa.data.tables import Chosen


@dataclass(frozen=True)
class Division:
    """How rows are divided into those to train on and those held out."""

    train_size: int | None
    """Rows to train on; None: all that are left."""
    eval_size: int | float | None
    """Rows held out: see :func:`lorafa.data.heldout.rows_of`."""
    seed: int
    weights: tuple[float, ...] | None = None
    """Where there are several sources, which share of the rows to train on is from each."""


@dataclass(frozen=True)
class Selection:
    """What is chosen. A row takes a few bytes here, its text none."""

    sources: tuple[Source, ...]
    counts: tuple[int, ...]
    order: Numbers
    """The rows to train on, in their order, by their numbers over all sources; one may be there twice."""
    heldout: Sequence[Record]
    source: str
    """Where all of them are from, in words."""
    repeated: int

    def __len__(self) -> int:
        return len(self.order)

    def training(self) -> Iterator[tuple[int, Record]]:
        """(number, record) of the rows to train on, each once, in the order in which they are stored."""
        needed = np.zeros(sum(self.counts), bool)
        needed[self.order] = True
        return _records(self.sources, self.counts, needed)

    def records(self) -> Records:
        """All of them in memory."""
        found = dict(self.training())
        train = [found[number] for number in self.order.tolist()]
        return Records(train, list(self.heldout), self.source, self.repeated)


def as_loaded(records: Records) -> Selection:
    """What a data set has chosen by itself."""
    source, count = ListedRecords(records.source, records.train), len(records.train)
    order = np.arange(count, dtype=np.int32)
    return Selection((source,), (count,), order, records.heldout, records.source, records.repeated)


def select(sources: Sequence[Source], division: Division, heldout: Source | None = None) -> Selection:
    """Read all records of some sources, hold some out, and choose those to train on among the others.

    Held out are rows of each source as if it stood alone: the first ones of an order that its own number of rows and
    the seed decide. A number of rows, and the usual one, is that of all sources together, shared out by their numbers
    of rows; a share is one of each. No row that answers what any held-out row asks is trained on.

    Args:
        heldout: all records of this one are held out, and none of ``sources``.

    Raises:
        DataError: a row is broken, or there are fewer rows than asked for.
        SourceError: something cannot be read.
    """
    counts = [sum(1 for _ in source.records()) for source in sources]
    orders: list[Numbers] = [np.frombuffer(shuffled(count, division.seed), np.int32) for count in counts]
    if heldout is None:
        held = _held(division.eval_size, counts)
        asked = _first(sources, orders, held)
    else:
        held = [0] * len(sources)
        count = sum(1 for _ in heldout.records())
        asked = _first([heldout], [np.frombuffer(shuffled(count, division.seed), np.int32)], [count])
    repeats = _repeats(sources, counts, Overlap(asked)) if asked else [np.zeros(count, bool) for count in counts]
    rest = [order[skipped:] for order, skipped in zip(orders, held, strict=True)]
    left = [order[~repeat[order]] for order, repeat in zip(rest, repeats, strict=True)]
    repeated = sum(map(len, rest)) - sum(map(len, left))
    _check(sources, counts, left, repeated, sum(held), division, heldout)
    bases = np.cumsum([0, *counts[:-1]], dtype=np.int32)
    for own, base in zip(left, bases, strict=True):
        own += base  # in place: there may be many
    order = mixed(left, division.weights, division.train_size)
    taken = _taken(bases, order)
    if division.weights is not None and 0 in taken:
        missing = sources[taken.index(0)].name
        raise DataError(
            f"data.weights={list(division.weights)} asks for rows of {missing}, and its share of the {len(order):,} "
            "rows to train on is less than one row. Raise data.train_size or its weight, or take it out."
        )
    words = _words(sources, counts, taken)
    return Selection(
        tuple(sources), tuple(counts), order, asked, words if heldout is None else f"{words}, held out {heldout.name}",
        repeated,
    )  # fmt: skip


def _held(size: int | float | None, counts: Sequence[int]) -> list[int]:
    """How many rows of each source are held out."""
    if len(counts) == 1 or isinstance(size, float):
        return [rows_of(size, count) for count in counts]
    return apportioned(rows_of(size, sum(counts)), counts)


def _first(sources: Sequence[Source], orders: Sequence[Numbers], sizes: Sequence[int]) -> list[Record]:
    """The first records of each source in its order; those of several take turns."""
    found: list[Record] = []
    turns: list[Numbers] = []
    for source, order, size in zip(sources, orders, sizes, strict=True):
        chosen = np.zeros(len(order), bool)
        chosen[order[:size]] = True
        own = dict(source.records(chosen)) if size else {}
        turns.append(np.arange(len(found), len(found) + len(own), dtype=np.int32))
        found += [own[number] for number in order[:size].tolist()]
    return [found[at] for at in mixed(turns, None, None).tolist()]


def _repeats(sources: Sequence[Source], counts: Sequence[int], overlap: Overlap) -> list[Chosen]:
    """For each row of each source whether it answers what a held-out one asks."""
    found = []
    for source, count in zip(sources, counts, strict=True):
        repeat = np.zeros(count, bool)
        for number, record in source.records():
            repeat[number] = record in overlap
        found.append(repeat)
    return found


def _check(
    sources: Sequence[Source],
    counts: Sequence[int],
    left: Sequence[Numbers],
    repeated: int,
    held: int,
    division: Division,
    heldout: Source | None,
) -> None:
    names, size = " + ".join(source.name for source in sources), division.train_size
    if division.weights is not None:
        size = None  # a source that is short begins again
        for source, own in zip(sources, left, strict=True):
            if not len(own):
                raise DataError(
                    f"No row of {source.name} is left to train on, and data.weights asks for some. Lower "
                    "data.eval_size, or take it out."
                )
    rows = sum(map(len, left))
    if heldout is None:
        check_enough(names, sum(counts), repeated, held, rows, size)
    else:
        check_enough_beside(names, sum(counts), repeated, heldout.name, rows, size)


def _taken(bases: Numbers, order: Numbers) -> list[int]:
    """How many rows to train on are from each source."""
    taken: list[int] = np.bincount(np.searchsorted(bases, order, side="right") - 1, minlength=len(bases)).tolist()
    return taken


def _words(sources: Sequence[Source], counts: Sequence[int], taken: Sequence[int]) -> str:
    """The names of the sources; of several with how many samples are from each, and of how many rows."""
    if len(sources) == 1:
        return sources[0].name
    return " + ".join(
        f"{source.name} ({own:,} of {count:,} rows)" if own <= count else f"{source.name} ({own:,} from {count:,} rows)"
        for source, own, count in zip(sources, taken, counts, strict=True)
    )


def _records(sources: Sequence[Source], counts: Sequence[int], chosen: Chosen) -> Iterator[tuple[int, Record]]:
    base = 0
    for source, count in zip(sources, counts, strict=True):
        if chosen[base : base + count].any():
            for number, record in source.records(chosen[base : base + count]):
                yield base + number, record
        base += count
