"""The settings of `peft` where an adapter is trained on: those of its file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorafa.errors import ConfigError, SourceError, did_you_mean
from lorafa.storage.paths import user_path
from lorafa.train.settings.run import PeftConfig, RunConfig


def with_settings_of_file(config: RunConfig, given: Iterable[str]) -> RunConfig:
    """The same run with every setting of `peft` as the adapter's file has it.

    Args:
        given: names of the settings of `peft` that were asked for, which must say what the file says.

    Raises:
        ConfigError: one of them says something else.
        SourceError: there is no adapter; as :func:`lorafa.io.adapter_files.read_adapter`.
    """
    folder = user_path(str(config.peft.adapter))
    stored = peft_settings(folder)
    for name in given:
        asked, found = getattr(config.peft, name), stored.get(name)
        if name in stored and _same(asked) != _same(found):
            raise ConfigError(
                f"peft.{name}={asked} is not what the adapter in {str(folder)!r} was made with: {found}. Drop it to "
                "train that adapter on, or drop peft.adapter for a new one."
            )
    return replace(config, peft=replace(config.peft, **stored))


def peft_settings(folder: Path) -> dict[str, Any]:
    """The settings of `peft` that an adapter in a folder was made with.

    Raises:
        SourceError: there is none.
    """
    from lorafa.io.adapter_files import read_adapter  # with torch, which the settings are read without

    if not os.path.isfile(folder / "adapter_config.json"):
        near = [path.name for path in folder.parent.iterdir()] if os.path.isdir(folder.parent) else []
        hint = f" It is a run: give {folder / 'adapter'}." if os.path.isdir(folder / "adapter") else ""
        raise SourceError(
            f"peft.adapter={folder} holds no adapter_config.json, so it is no adapter."
            f"{hint or did_you_mean(folder.name, near)}"
        )
    config = read_adapter(folder).config
    names = [one.name for one in fields(PeftConfig) if one.name not in PeftConfig.in_its_place]
    values = {name: getattr(config, name) for name in names}
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in values.items()}


def _same(value: Any) -> Any:
    """Lists of names without their order, which says nothing."""
    return sorted(value) if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value) else value
