"""A tracker as the runner knows it, and those of a run made ready."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback

from lorafa.errors import ConfigError
from lorafa.train.trackers import TRACKERS, names_in


@dataclass(frozen=True)
class Reported:
    """The training that is reported."""

    folder: Path
    """The run directory."""
    project: str
    """What its run is filed under."""
    step: int
    """Steps that were made before this part of it."""
    identity: str
    """A name that no other run has, and that stays where this one is continued."""


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A line of ``TRACKERS``."""

    package: str
    """What has to be installed."""
    make: Callable[[Reported], TrainerCallback]
    """Makes the callback that reports."""
    environment: Callable[[Reported], dict[str, str]] = field(default=lambda _: {})
    """Variables it goes by, for those that the user has not set."""
    arguments: Callable[[Reported], dict[str, str]] = field(default=lambda _: {})
    """What `transformers.TrainingArguments` is told for it."""
    end: Callable[[Reported, bool], None] = lambda *_: None
    """Ends what the callback leaves open, and is told whether the training failed: the next run is another one."""


def named_trackers(report_to: str | Sequence[str]) -> list[Tracker]:
    """The trackers that the setting names.

    Raises:
        ConfigError: one of them is not installed.
    """
    named = [TRACKERS.get(name) for name in names_in(report_to)]
    if missing := [tracker.package for tracker in named if find_spec(tracker.package) is None]:
        raise ConfigError(
            f"report_to: {' and '.join(missing)} cannot be reported to, the package is not installed. Run: pip install "
            f"{' '.join(missing)}; or leave it out."
        )
    return named


@contextmanager
def reporting(trackers: Sequence[Tracker], reported: Reported) -> Iterator[list[TrainerCallback]]:
    """Their callbacks; inside the block the variables of the environment they go by are set."""
    wanted = {name: value for tracker in trackers for name, value in tracker.environment(reported).items()}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    failed = True
    try:
        yield [tracker.make(reported) for tracker in trackers]
        failed = False
    finally:
        for tracker in trackers:
            tracker.end(reported, failed)
        for name in added:
            os.environ.pop(name, None)
