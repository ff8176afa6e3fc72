"""The adapter that a name stands for: a run directory has one."""

from __future__ import annotations

import os

from lorafa.config import CONFIG_NAME
from lorafa.errors import ConfigError
from lorafa.runs.record import CONFIG, RunDirectory
from lorafa.storage.paths import user_path


def run_in(name: str) -> RunDirectory | None:
    """The run whose directory this is; None for anything else: folders of adapters may hold settings of others."""
    path = user_path(name)
    is_run = os.path.isfile(path / CONFIG) and not os.path.isfile(path / CONFIG_NAME)
    return RunDirectory.open(path) if is_run else None


def adapter_in(name: str) -> str:
    """The adapter of a run directory; the folder or Hub id of any other adapter itself.

    Raises:
        ConfigError: the run has trained none, or none yet; or this is a model.
    """
    run, path = run_in(name), user_path(name)
    if run is not None:
        return str(run.trained_adapter())
    if os.path.isdir(path) and not os.path.isfile(path / CONFIG_NAME) and os.path.isfile(path / "config.json"):
        raise ConfigError(f"{name!r} is a model and no adapter. Name the folder of an adapter, or a run.")
    return name
