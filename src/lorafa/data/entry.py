"""A data set as the runner knows it: how it is loaded, and its own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafa.data.records import Records
from lorafa.errors import ConfigError

if TYPE_CHECKING:
    from lorafa.data.source import Source


@dataclass(frozen=True)
class Wanted:
    """What is asked of a data set."""

    name: str
    """What stands after ``data=``: the name of the data set, a path, a Hub id."""
    train_size: int | None
    """Records to train on; None: all that are left after the held-out ones."""
    eval_size: Any
    """Records held out: how many. Which they are does not depend on ``train_size``. A data set that ``counts`` its rows
    may be asked for a share of them below 1 as well, or for the usual number (None)."""
    seed: int
    """Decides which records are held out, and the order of the others."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A line of ``DATASETS``."""

    load: Callable[[Wanted, Any], Records] | None = None
    """(what is wanted, own settings) -> the records."""
    open: Callable[[str, Any], Source] | None = None
    """In its place, for what can be read row by row: (name, own settings) -> the records, of which the right ones are
    then held out. Such data sets can be mixed, and be larger than memory."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, all with defaults; each is ``data.<name>``."""
    counts: bool = False
    """Where it has ``load``, whether it knows how many rows there are; `lorafa.data.heldout.split_records` holds the
    right number out."""
    read_heldout: Callable[[str], Records | None] | None = None
    """Where it has ``load``: the records of ``data.eval_file``, written as its own are; None where the file has other
    columns, and is then read in the forms that all files have."""
    hub: str | None = None
    """The data set of the Hub that its rows come from, where no file is named; None: they come from elsewhere."""
    labels: tuple[str, ...] = ()
    """The words of its classes, where its answers are these."""
    takes: Callable[[str], bool] | None = None
    """For a source of many data sets: whether a name is one of its own, by the look of it. None: its line's name is."""

    def __post_init__(self) -> None:
        if (self.load is None) == (self.open is None):
            raise ConfigError("A data set has either load or open. Give one of the two.")


@dataclass(frozen=True)
class ChatTemplate:
    """A line of ``TEMPLATES``."""

    text: str
    """In Jinja; begins with ``{{ start }}``, the beginning-of-sequence token where the tokenizer puts one."""
