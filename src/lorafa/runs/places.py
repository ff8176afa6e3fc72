"""Paths of a run's settings as its record keeps them: whole, so that it can be continued from any working folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lorafa.data import DATASETS
from lorafa.models import MODELS
from lorafa.storage.paths import user_path

PATHS = ("_dir", "_file")
"""Settings that end so are paths, whether there is something or not."""
NAMES = (
    *("model.name", "data.name", "data.file", "data.template", "peft.adapter", "init.teacher"),
    *("align.teacher", "align.cache", "eval.base"),
)
"""Settings that may name a file or a folder, and may name something else."""


def with_whole_paths(settings: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Plain settings with what they name here as absolute paths."""
    return {name: _whole(f"{within}{name}", value) for name, value in settings.items()}


def _whole(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return with_whole_paths(value, f"{key}.")
    if isinstance(value, (list, tuple)) and key in NAMES:
        return [_whole(key, one) for one in value]
    if not isinstance(value, str) or not value:
        return value
    if key.endswith(PATHS):
        return os.path.abspath(user_path(value))
    known = key not in NAMES or value in MODELS or value in DATASETS
    return value if known or not os.path.lexists(user_path(value)) else os.path.abspath(user_path(value))
