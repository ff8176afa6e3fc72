"""Records of a local file: .jsonl, one object a line, or .json, a list of objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafa.data.entry import DataSet, Wanted
from lorafa.data.records import Records
from lorafa.data.sources import read_rows, records_of
from lorafa.errors import ConfigError

ENDINGS = (".jsonl", ".json")
"""The endings of files that are read, in small or capital letters."""


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


def is_file(name: str) -> bool:
    """Whether the name is that of a file of records, there or not."""
    return Path(name).suffix.lower() in ENDINGS


def _load(wanted: Wanted, settings: FileSettings) -> Records:
    rows = read_rows(Path(wanted.name).expanduser())
    return records_of(rows, wanted, settings.prompt_column, settings.completion_column)


FILE = DataSet(load=_load, settings=FileSettings, counts=True, takes=is_file)
