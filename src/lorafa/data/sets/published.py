"""What the data sets of published scripts share: where their rows come from, which are held out, what is said if not.

The scripts are those of LoRA-GA (arXiv:2407.05000) and LoRA-One (arXiv:2502.01235). Where they hold out the first or
the last rows, or another split, so does this, whatever the seed, and rows keep the order in which they are stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from lorafa.data.cells import Row, columns
from lorafa.data.entry import DataSet, Wanted
from lorafa.data.files import format_of, table_of
from lorafa.data.heldout import check_enough, rows_of, split_records, without_heldout
from lorafa.data.hub import HubSettings, hub_rows
from lorafa.data.records import Record, Records
from lorafa.data.sets.prompts import ToRecord
from lorafa.errors import DataError, SourceError, did_you_mean, first_line, shorten, warn
from lorafa.storage.paths import user_path


@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """Where the rows come from."""

    file: str | None = None
    """Local copy of the rows, with the columns they have on the Hub; null fetches them from there."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the Hub."""


@dataclass(frozen=True, kw_only=True)
class Only:
    """Which rows are taken."""

    keeps: Callable[[Row, str], bool]
    """(row, where it stands) -> whether it is one of them."""
    called: str
    """What they are, after "row": "of GSM8K"."""
    having: str
    """What they have, after "none of its rows has": "GSM in its column 'type'"."""


class HeldOut(Protocol):
    """Which rows are held out."""

    def divided(self, published: Published, settings: PublishedSettings, wanted: Wanted) -> Records:
        """The records to train on and those held out.

        Raises:
            SourceError, DataError: as :meth:`Published.read`, or there are fewer rows than asked for.
        """


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set as the scripts read it."""

    hub: str
    """Its id on the Hub."""
    subset: str | None = None
    """Its configuration there."""
    file: str
    """What a local copy is called, for messages."""
    columns: tuple[str, ...]
    """What each row has."""
    record: ToRecord
    """How a row becomes a record."""
    heldout: HeldOut
    labels: tuple[str, ...] = ()
    """The words of its classes, where its answers are these."""
    only: Only | None = None
    streamed: bool = False
    """Whether it is so large that no more rows than are needed are fetched, anew each time."""

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return self.hub if self.subset is None else f"{self.hub} ({self.subset})"

    def data_set(self, *, settings: type[PublishedSettings]) -> DataSet:
        """Its line of ``DATASETS``."""
        return DataSet(
            load=self.load, read_heldout=self.read_heldout, settings=settings, counts=True, hub=self.hub,
            labels=self.labels,
        )  # fmt: skip

    def load(self, wanted: Wanted, settings: PublishedSettings) -> Records:
        """The records to train on and those held out.

        Raises:
            SourceError, DataError: as :meth:`read`, or there are fewer rows than asked for.
        """
        return self.heldout.divided(self, settings, wanted)

    def read(self, settings: PublishedSettings, *, split: str = "train", limit: int | None = None) -> list[Record]:
        """The records of a file, or of a split on the Hub, in the order in which they are stored.

        Args:
            limit: how many are read at most; None: all.

        Raises:
            SourceError: the rows cannot be read or fetched; it says what else could be done.
            DataError: a row is broken, columns are missing, or no row is one of those that are taken.
        """
        if settings.file is None:
            return self._converted(self.title, self._of_hub(settings.revision, split), limit)
        path = user_path(settings.file)
        if not os.path.isfile(path):
            raise SourceError(
                f"data.file={path} is no file. Give a copy of {self.file}, or leave it out to fetch {self.title}."
            )
        return self._converted(settings.file, self._of_file(settings.file), limit)

    def read_heldout(self, file: str) -> Records | None:
        """The records of ``data.eval_file``, written as those that are trained on; None where it has other columns.

        Raises:
            SourceError, DataError: as :meth:`read`.
        """
        if format_of(user_path(file)) is None:
            return None
        first = next(self._of_file(file), None)
        if first is None or any(column not in first[1] for column in self.columns):
            return None
        return Records([], self._converted(file, self._of_file(file), None), file)

    def words(self, count: int) -> str:
        """A number of rows, in words."""
        return f"{count} rows{'' if self.only is None else f' {self.only.called}'}"

    def _of_file(self, file: str) -> Iterator[tuple[str, Row]]:
        return ((place, row) for _, place, row in table_of(file).rows())

    def _of_hub(self, revision: str | None, split: str) -> Iterator[tuple[str, Row]]:
        chosen = HubSettings(subset=self.subset, split=split, revision=revision)
        try:
            yield from hub_rows(self.hub, chosen, streamed=self.streamed)
        except SourceError as error:
            raise SourceError(
                f"Could not load {self.title} from the Hub: {first_line(error.__cause__ or error)}. Next step: check "
                f"the connection, or give a local copy, data.file=<{self.file}> with the columns "
                f"{', '.join(self.columns)}."
            ) from error

    def _converted(self, source: str, rows: Iterable[tuple[str, Row]], limit: int | None) -> list[Record]:
        records: list[Record] = []
        blank: list[str] = []
        count = 0
        for count, (place, row) in enumerate(rows, 1):
            if count == 1:
                self._check_columns(source, row)
            if self.only is not None and not self.only.keeps(row, place):
                continue
            record = self.record(row, place)
            if record is None:
                blank.append(place)
                continue
            records.append(record)
            if len(records) == limit:
                break
        if blank:
            warn(f"{len(blank)} rows of {source} have a blank answer and are left out: {shorten(blank)}.")
        if not records and self.only is not None and not blank:
            raise DataError(
                f"{source} holds no row {self.only.called}: none of its {count} rows has {self.only.having}. Give a "
                f"copy of {self.file}."
            )
        if not records:
            raise DataError(f"{source} holds no rows that can be trained on. Give a copy of {self.file}.")
        return records

    def _check_columns(self, source: str, row: Row) -> None:
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise DataError(
                f"{source} has no column {missing[0]!r}.{did_you_mean(missing[0], row)} Its columns are: "
                f"{columns(row)}. Give a copy of {self.file}, with the columns {', '.join(self.columns)}."
            )


@dataclass(frozen=True)
class InOrder:
    """The first rows are trained on, and of those after them the first are held out.

    A row that repeats a held-out question has one in its place that comes after the held-out ones, where there is one.
    Of fewer rows than both the last ones are held out: the same share, or as many as are asked for.
    """

    trained: int
    heldout: int

    def divided(self, published: Published, settings: PublishedSettings, wanted: Wanted) -> Records:
        asked_for = wanted.eval_size if isinstance(wanted.eval_size, int) else 0
        limit = self.trained + max(self.heldout, asked_for) if published.streamed else None
        records = published.read(settings, limit=limit)
        count, source = len(records), settings.file or published.title
        usual = min(self.heldout, count * self.heldout // (self.trained + self.heldout)) or int(count > 1)
        held = usual if wanted.eval_size is None else rows_of(wanted.eval_size, count)
        first = max(min(self.trained, count - held), 0)
        heldout = records[first:][:held]
        rest = without_heldout(records[:first], heldout)
        repeated = first - len(rest)
        if repeated and first == self.trained:
            rest += without_heldout(records[first + held :], heldout)[:repeated]
        asked = 1 if wanted.train_size is None else wanted.train_size
        if len(heldout) < held or len(rest) < asked:
            raise DataError(
                f"{source} holds {published.words(count)}, of which the first {first} may be trained on "
                f"({repeated} of them repeat a held-out question), asked for {held} to evaluate and {asked} "
                "to train on. Lower data.eval_size or data.train_size."
            )
        return Records(rest[: wanted.train_size], heldout, source, repeated)


@dataclass(frozen=True)
class OtherSplit:
    """The rows of another split are held out, all of them or the first so many.

    A local file has one split: unless ``data.eval_file`` is given, rows of it are held out as of any other file.
    """

    name: str

    def divided(self, published: Published, settings: PublishedSettings, wanted: Wanted) -> Records:
        train, source = published.read(settings), settings.file or published.title
        if settings.file is not None:
            return split_records(train, wanted.train_size, wanted.eval_size, wanted.seed, source)
        there = [] if wanted.eval_size == 0 else published.read(settings, split=self.name)
        held = len(there) if wanted.eval_size is None else rows_of(wanted.eval_size, len(there))
        if held > len(there):
            raise DataError(
                f"{source} holds {len(there)} rows in the split {self.name}, which is held out, asked for {held} to "
                "evaluate. Lower data.eval_size."
            )
        heldout = there[:held]
        rest = without_heldout(train, heldout)
        check_enough(source, len(train) + held, len(train) - len(rest), held, len(rest), wanted.train_size)
        named = f"{source}, held out {self.name}" if held else source
        return Records(rest[: wanted.train_size], heldout, named, len(train) - len(rest))


@dataclass(frozen=True)
class Drawn:
    """Rows that ``data.seed`` draws are held out: a number, but at most a tenth, or a share below 1."""

    size: int | float

    def divided(self, published: Published, settings: PublishedSettings, wanted: Wanted) -> Records:
        records = published.read(settings)
        count = len(records)
        usual = min(self.size, count // 10) or int(count > 1) if isinstance(self.size, int) else self.size
        size = usual if wanted.eval_size is None else wanted.eval_size
        return split_records(records, wanted.train_size, size, wanted.seed, settings.file or published.title)
