"""Records of a dataset of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorafa.data import data_set_names
from lorafa.data.entry import DataSet, Wanted
from lorafa.data.files import FileSettings, is_file
from lorafa.data.records import Records
from lorafa.data.rows import Row
from lorafa.data.sources import no_such_data_set, records_of
from lorafa.errors import SourceError, first_line

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


def _load(wanted: Wanted, settings: HubSettings) -> Records:
    if Path(wanted.name).expanduser().exists():
        raise no_such_data_set(wanted.name)
    rows = hub_rows(wanted.name, settings)
    return records_of(rows, wanted, settings.prompt_column, settings.completion_column)


def hub_rows(name: str, settings: HubSettings) -> list[tuple[str, Row]]:
    """The rows of a data set of the Hub, each with where it stands.

    Raises:
        SourceError: it cannot be loaded.
    """
    import datasets  # takes seconds to import, and only rows of the Hub need it

    subset, split = settings.subset, settings.split
    try:
        rows: Iterable[Row] = datasets.load_dataset(name, subset, split=split, revision=settings.revision)
    except Exception as error:  # of the library itself, of its network stack, of its file readers
        others = " or ".join(f"data={known}" for known in data_set_names())
        raise SourceError(
            f"Could not load {name} (subset {subset}, split {split}) from the Hub: {first_line(error)}. Next step: "
            f"check data.subset, data.split and the connection, or give data=<file.jsonl>, or {others}."
        ) from error
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, 1)]


HUB = DataSet(load=_load, settings=HubSettings, counts=True, takes=_is_hub_id)
