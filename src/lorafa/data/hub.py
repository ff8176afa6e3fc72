"""Records of a dataset of the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from lorafa.data import DATASETS, data_set_names
from lorafa.data.cells import Row, as_row
from lorafa.data.entry import DataSet
from lorafa.data.files import FileSettings, is_file, no_such_data_set
from lorafa.data.records import Record
from lorafa.data.rows import Reading
from lorafa.data.source import Columns, Source, digest_of, no_rows
from lorafa.errors import SourceError, first_line
from lorafa.storage.paths import user_path

if TYPE_CHECKING:
    from lorafa.data.tables import Chosen

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class HubSettings(FileSettings):
    """Which part of it is read."""

    subset: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Branch, tag or commit of the data set."""


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not is_file(name)


class HubRows:
    """The rows of a data set of the Hub, which `datasets` keeps on disk."""

    def __init__(self, name: str, dataset: Any, columns: Columns) -> None:
        self.name = name
        self._dataset = dataset
        self._columns = columns

    def count(self) -> int:
        return len(self._dataset)

    def records(self, chosen: Chosen | None = None) -> Iterator[tuple[int, Record]]:
        if not len(self._dataset):
            raise no_rows(self.name, self._columns.reading)
        convert = self._columns.of(self.name, self._dataset[0])
        rows, numbers = self._dataset, list(range(len(self._dataset))) if chosen is None else []
        if chosen is not None:
            numbers = [number for number, is_chosen in enumerate(chosen) if is_chosen]
            rows = self._dataset.select(numbers)
        for number, row in zip(numbers, rows, strict=True):
            yield number, convert(as_row(row), f"{self.name}, row {number + 1}")

    def digest(self) -> str:
        return digest_of(repr(row) for row in self._dataset)

    def read_for(self, reading: Reading) -> Source:
        return HubRows(self.name, self._dataset, replace(self._columns, reading=reading))


def _open(name: str, settings: HubSettings) -> Source:
    return HubRows(name, _dataset(name, settings), settings.columns())


def hub_rows(name: str, settings: HubSettings, *, streamed: bool = False) -> Iterator[tuple[str, Row]]:
    """The rows of a data set of the Hub, each with where it stands.

    Args:
        streamed: fetch no more rows than are asked for, and keep none on disk.

    Raises:
        SourceError: it cannot be loaded.
    """
    rows = iter(_dataset(name, settings, streamed))
    where = name if settings.split == "train" else f"{name} ({settings.split})"
    for number in count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # what is streamed is fetched here
            raise _not_loaded(name, settings, error) from error
        yield f"{where}, row {number}", as_row(row)


def _dataset(name: str, settings: HubSettings, streamed: bool = False) -> Any:
    import datasets  # takes seconds to import, and only rows of the Hub need it

    if os.path.exists(user_path(name)):
        raise no_such_data_set(name)
    how = {"streaming": True} if streamed else {}
    try:
        return datasets.load_dataset(name, settings.subset, split=settings.split, revision=settings.revision, **how)
    except Exception as error:  # of the library itself, of its network stack, of its file readers
        raise _not_loaded(name, settings, error) from error


def _not_loaded(name: str, settings: HubSettings, error: Exception) -> SourceError:
    made = [known for known in data_set_names() if DATASETS.get(known).hub is None]
    others = " or ".join(f"data={known}" for known in made)
    return SourceError(
        f"Could not load {name} (subset {settings.subset}, split {settings.split}) from the Hub: {first_line(error)}. "
        f"Next step: check data.subset, data.split and the connection, or give data=<file.jsonl>, or {others}."
    )


HUB = DataSet(open=_open, settings=HubSettings, takes=_is_hub_id)
