"""Where a training reports to while it runs, beside its own record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
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
