"""Where records come from, one after another; they are numbered from 0 and can be read again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from lorafa.data.cells import Row
from lorafa.data.records import Record
from lorafa.data.rows import ANSWERS, Convert, Reading, converter
from lorafa.data.tables import Table
from lorafa.errors import DataError, shorten, warn

if TYPE_CHECKING:
    from lorafa.data.tables import Chosen


class Source(Protocol):
    """Records by a name, each time the same ones in the same order."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def count(self) -> int:
        """How many records there are."""

    def records(self, chosen: Chosen | None = None) -> Iterator[tuple[int, Record]]:
        """(number, record) of all records or the chosen ones.

        Raises:
            DataError: a row is broken; it is named.
            SourceError: something cannot be read.
        """

    def digest(self) -> str:
        """What changes where any of the records does."""

    def read_for(self, reading: Reading) -> Source:
        """The same rows, read for something else; records that are there already stay what they are."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read; None: the first form that is there."""

    prompt: str | None = None
    completion: str | None = None
    reading: Reading = ANSWERS
    """What the rows are read for."""

    def of(self, name: str, first: Row) -> Convert:
        """How the rows become records, judged by the first one."""
        return converter(name, first, self.prompt, self.completion, self.reading)


class ListedRecords:
    """Records that are in memory."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self.name = name
        self._records = records

    def count(self) -> int:
        return len(self._records)

    def records(self, chosen: Chosen | None = None) -> Iterator[tuple[int, Record]]:
        return ((at, record) for at, record in enumerate(self._records) if chosen is None or chosen[at])

    def digest(self) -> str:
        return digest_of(map(repr, self._records))

    def read_for(self, reading: Reading) -> Source:
        return self


class ListedRows:
    """Rows that are at hand, each with where it stands."""

    def __init__(self, name: str, rows: Sequence[tuple[str, Row]], columns: Columns) -> None:
        self.name = name
        self._rows = rows
        self._columns = columns

    def count(self) -> int:
        return len(self._rows)

    def records(self, chosen: Chosen | None = None) -> Iterator[tuple[int, Record]]:
        if not len(self._rows):
            raise no_rows(self.name, self._columns.reading)
        convert = self._columns.of(self.name, self._rows[0][1])
        for number in range(len(self._rows)):
            if chosen is None or chosen[number]:
                place, row = self._rows[number]
                yield number, convert(row, place)

    def digest(self) -> str:
        return digest_of(repr(row) for row in self._rows)

    def read_for(self, reading: Reading) -> Source:
        return ListedRows(self.name, self._rows, replace(self._columns, reading=reading))


class Tables:
    """The rows of one file, or of all files of a folder one after another, each of a form of its own."""

    def __init__(self, name: str, tables: Sequence[Table], columns: Columns) -> None:
        self.name = name
        self._columns = columns
        self._tables = tables

    def count(self) -> int:
        return sum(self._counts)

    def records(self, chosen: Chosen | None = None) -> Iterator[tuple[int, Record]]:
        if not self.count():
            raise no_rows(self.name, self._columns.reading)
        base = 0
        for table, count, convert in zip(self._tables, self._counts, self._converters, strict=True):
            if convert is not None:
                for number, place, row in table.rows(None if chosen is None else chosen[base : base + count]):
                    yield base + number, convert(row, place)
            base += count

    def digest(self) -> str:
        return digest_of(text for table in self._tables for text in (str(table.path), table.digest()))

    def read_for(self, reading: Reading) -> Source:
        return Tables(self.name, self._tables, replace(self._columns, reading=reading))

    @cached_property
    def _counts(self) -> list[int]:
        counts = [table.count() for table in self._tables]
        empty = [table.path.name for table, count in zip(self._tables, counts, strict=True) if not count]
        if empty and any(counts):
            warn(f"{len(empty)} of {len(counts)} files in {self.name} hold no rows: {shorten(empty)}.")
        return counts

    @cached_property
    def _converters(self) -> list[Convert | None]:
        """How the rows of each file become records; None for a file without rows."""
        return [
            self._converter(table) if count else None for table, count in zip(self._tables, self._counts, strict=True)
        ]

    def _converter(self, table: Table) -> Convert:
        _, _, first = next(table.rows())
        return self._columns.of(str(table.path), first)


def no_rows(name: str, reading: Reading = ANSWERS) -> DataError:
    """The error for a source that is empty."""
    return DataError(f"{name} holds no rows. Each row has one of these sets of columns: {reading.accepted}.")


def digest_of(texts: Iterator[str]) -> str:
    """SHA-256 of texts, one after another."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
