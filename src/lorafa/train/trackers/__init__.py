"""Where a training reports to while it runs, beside its own record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafa.train.trackers.entry import Tracker

TRACKERS: Registry[Tracker] = Registry(
    "tracker",
    {
        "mlflow": "lorafa.train.trackers.of_transformers:MLFLOW",
        "tensorboard": "lorafa.train.trackers.of_transformers:TENSORBOARD",
        "trackio": "lorafa.train.trackers.of_transformers:TRACKIO",
        "wandb": "lorafa.train.trackers.of_transformers:WANDB",
    },
)


def names_in(report_to: str | Sequence[str]) -> list[str]:
    """The names of trackers in a setting; none where it is ``none``."""
    named = [report_to] if isinstance(report_to, str) else list(report_to)
    return [] if named == ["none"] else named
