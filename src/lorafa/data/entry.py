"""A data set as the runner knows it: how it is loaded, and its own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorafa.data.records import Records


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

    load: Callable[[Wanted, Any], Records]
    """(what is wanted, own settings) -> the records."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, all with defaults; each is ``data.<name>``."""
    counts: bool = False
    """Whether it knows how many rows there are; `lorafa.data.heldout.split_records` holds the right number out."""
    takes: Callable[[str], bool] | None = None
    """For a source of many data sets: whether a name is one of its own, by the look of it. None: its line's name is."""


@dataclass(frozen=True)
class ChatTemplate:
    """A line of ``TEMPLATES``."""

    text: str
    """In Jinja; begins with ``{{ start }}``, the beginning-of-sequence token where the tokenizer puts one."""
