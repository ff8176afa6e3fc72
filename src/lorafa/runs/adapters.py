"""The adapter that a name stands for: a run directory has one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorafa.config import CONFIG_NAME
from lorafa.errors import ConfigError
from lorafa.runs import CONFIG
from lorafa.storage.paths import user_path

if TYPE_CHECKING:
    from lorafa.runs.record import RunDirectory


def run_in(name: str | Path) -> RunDirectory | None:
    """The run whose directory this is; None for anything else: folders of adapters may hold settings of others."""
    path = user_path(name)
    if not os.path.isfile(path / CONFIG) or os.path.isfile(path / CONFIG_NAME):
        return None
    from lorafa.runs.record import RunDirectory  # with yaml, which adapters are found without

    return RunDirectory.open(path)


def adapter_in(name: str | Path) -> str:
    """The adapter of a run directory; the folder or Hub id of any other adapter itself.

    Raises:
        ConfigError: the run has trained none, or none yet; or this is a model.
    """
    run, path = run_in(name), user_path(name)
    if run is not None:
        return str(run.trained_adapter())
    if os.path.isdir(path) and not os.path.isfile(path / CONFIG_NAME) and os.path.isfile(path / "config.json"):
        raise ConfigError(f"{str(name)!r} is a model and no adapter. Name the folder of an adapter, or a run.")
    return str(name)
