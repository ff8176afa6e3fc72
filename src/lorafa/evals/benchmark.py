"""What benchmarks with problems of their own have in common: where these are, and that no run holds them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lorafa.data.cells import Row, columns
from lorafa.data.files import read_rows
from lorafa.data.hub import HubSettings, hub_rows
from lorafa.errors import ConfigError, DataError, SourceError, first_line
from lorafa.storage.paths import user_path


@dataclass(frozen=True)
class Official:
    """Where the problems of a benchmark are published."""

    what: str
    """In words: "the test problems"."""
    hub_id: str
    subset: str | None
    split: str
    copy: str
    """What a copy is, for errors: "a copy of the official file"."""
    revision: str | None = None
    """Branch of the Hub; None: the usual one."""

    def rows(self, file: str | None, option: str) -> list[tuple[str, Row]]:
        """The rows of a copy, or of the Hub, each with where it stands.

        Args:
            option: how a copy is given, for the error: ``data=test.jsonl``.

        Raises:
            SourceError: they cannot be read or fetched.
            DataError: there are none.
        """
        found = read_rows(user_path(file)) if file is not None else self._of_hub(option)
        if not found:
            raise DataError(f"{file or self.hub_id} holds no rows. Give {self.copy}, {option}.")
        return found

    def _of_hub(self, option: str) -> list[tuple[str, Row]]:
        try:
            settings = HubSettings(subset=self.subset, split=self.split, revision=self.revision)
            return list(hub_rows(self.hub_id, settings))
        except SourceError as error:
            raise SourceError(
                f"Could not load {self.what}, {self.hub_id}, from the Hub: {first_line(error.__cause__ or error)}. "
                f"Next step: check the connection, or give {self.copy}, {option}."
            ) from error


def require_columns(rows: Iterable[tuple[str, Row]], wanted: Sequence[str], what: str) -> None:
    """Raises DataError for a row without one of the columns of the published form.

    Args:
        what: the published form, in words.
    """
    for place, row in rows:
        missing = [column for column in wanted if column not in row]
        if missing:
            raise DataError(f"{place}: no column {missing[0]!r}; this row has {columns(row)}. Give {what}.")


def asks_nothing(*_: object) -> list[Any]:
    """The items among a run's held-out records: none, as the benchmark has its own."""
    return []


def refuse_heldout(task: str) -> NoReturn:
    """Raises ConfigError: a training was asked to measure a benchmark that has problems of its own."""
    raise ConfigError(
        f"eval={task} asks nothing of a run's held-out rows, as it has problems of its own. Train with another "
        f"evaluation, and measure afterwards: lorafa eval <run> task={task}."
    )
