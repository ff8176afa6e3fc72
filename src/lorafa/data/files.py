"""Records of a local file, or of all files of a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorafa.data import data_set_names
from lorafa.data.cells import Row
from lorafa.data.delimited import CommaSeparated, TabSeparated
from lorafa.data.entry import DataSet
from lorafa.data.parquet import Parquet
from lorafa.data.source import Columns, Source, Tables
from lorafa.data.tables import JsonLines, JsonList, Table, what_it_is
from lorafa.errors import ConfigError, SourceError, did_you_mean, shorten, warn
from lorafa.storage.paths import user_path

FORMATS: Mapping[str, type[Table]] = {
    ".jsonl": JsonLines,
    ".json": JsonList,
    ".csv": CommaSeparated,
    ".tsv": TabSeparated,
    ".parquet": Parquet,
}
"""The endings of files that are read, in small or capital letters."""
PACKED = (".jsonl", ".json", ".csv", ".tsv")
"""Endings that may be followed by .gz."""
ENDINGS = f"{', '.join(FORMATS)} (and {', '.join(PACKED)} followed by .gz)"
"""Both, in words."""


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """Which columns are read."""

    prompt_column: str | None = None
    """Column of the prompts; null takes the first known one."""
    completion_column: str | None = None
    """Column of the answers; given together with prompt_column."""

    def __post_init__(self) -> None:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ConfigError("Give both data.prompt_column and data.completion_column, or neither.")
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise ConfigError(
                f"data.prompt_column and data.completion_column are both {self.prompt_column!r}. Give two columns."
            )

    def columns(self) -> Columns:
        """The same, for what reads them."""
        return Columns(self.prompt_column, self.completion_column)


def format_of(path: Path) -> type[Table] | None:
    """How a file of that name is read, there or not; None: not at all."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings[-1:] == [".gz"]:
        return FORMATS[endings[0]] if endings[0] in PACKED else None
    return FORMATS.get(endings[-1]) if endings else None


def is_file(name: str) -> bool:
    """Whether the name is that of a file of records, there or not, or of a folder."""
    path = user_path(name)
    return format_of(path) is not None or name.endswith("/") or (name != "" and os.path.isdir(path))


def open_file(name: str, settings: FileSettings) -> Source:
    """The rows of a file or a folder.

    Raises:
        SourceError: there is no file of rows.
    """
    path = user_path(name)
    whole_folder = os.path.isdir(path) and format_of(path) is None
    return Tables(name, _tables(path) if whole_folder else [table_of(name)], settings.columns())


def table_of(name: str) -> Table:
    """The file of that name.

    Raises:
        SourceError: it is not there, or no file of rows.
    """
    path = user_path(name)
    kind = format_of(path)
    if kind is None:
        raise SourceError(f"{name} is no file of rows{what_it_is(path)}. Give one that ends in {ENDINGS}, or a folder.")
    table = kind(path)
    with table.reading():
        return table


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """All rows of one file, each with where it stands.

    Raises:
        SourceError: there is no file of rows.
        DataError: it is not what its name says, or a row is broken.
    """
    return [(place, row) for _, place, row in table_of(str(path)).rows()]


def _tables(folder: Path) -> list[Table]:
    """The files of rows in a folder, by their names; what else is there is said, and not read."""
    try:
        inside = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror or error}. Check its permissions.") from error
    found: list[Table] = []
    other: list[str] = []
    for path in inside:
        kind = None if path.name.startswith(".") or path.is_dir() else format_of(path)
        if kind is None:
            other.append(path.name + ("/" if path.is_dir() else ""))
        else:
            found.append(kind(path))
    if not found:
        raise SourceError(
            f"The folder {str(folder)!r} holds no file of rows, but {shorten(other) or 'nothing'}. Files are read that "
            f"end in {ENDINGS}."
        )
    if other:
        warn(
            f"Of the folder {folder} {len(found)} files are read. Passed over: {shorten(other)}; hidden files, folders "
            f"in it and what does not end in {ENDINGS} are not read."
        )
    return found


def no_such_data_set(name: str) -> SourceError:
    """The error for a name that is none."""
    known = data_set_names()
    return SourceError(
        f"No dataset {name!r}{what_it_is(user_path(name))}.{did_you_mean(name, known)} Give "
        f"{', '.join(known)}, a file ending in {ENDINGS}, a folder of such files, or a Hub id of the form owner/name."
    )


FILE = DataSet(open=open_file, settings=FileSettings, takes=is_file)
