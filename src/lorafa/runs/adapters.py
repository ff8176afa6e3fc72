"""The adapter that a name stands for: a run directory has one."""

from __future__ import annotations

import os

from lorafa.config import CONFIG_NAME
from lorafa.errors import ConfigError
from lorafa.runs.record import CONFIG, RunDirectory
from lorafa.storage.paths import user_path


def adapter_in(name: str) -> str:
    """The adapter of a run directory; the folder or Hub id of any other adapter itself.

    Raises:
        ConfigError: the run has trained none, or none yet; or this is a model.
    """
    path = user_path(name)
    if os.path.isfile(path / CONFIG):
        run = RunDirectory.open(path)
        if not run.adapter.is_dir():
            status = run.result().get("status", "not begun")
            raise ConfigError(f"The run {name!r} has no adapter (status: {status}). Let it finish, or name another.")
        return str(run.adapter)
    if os.path.isdir(path) and not os.path.isfile(path / CONFIG_NAME) and os.path.isfile(path / "config.json"):
        raise ConfigError(f"{name!r} is a model and no adapter. Name the folder of an adapter, or a run.")
    return name
