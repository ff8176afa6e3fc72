"""Where runs lie: those that are named, and those in folders that are named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorafa.errors import ConfigError
from lorafa.runs import CONFIG
from lorafa.runs.record import RunDirectory
from lorafa.storage.paths import user_path

PAGE = "runs.html"
DEPTH = 4
"""Folders below the one given in which runs are looked for."""


def find(paths: Sequence[str | Path]) -> list[Path]:
    """The run directories among these paths and in the folders among them, each once, by name within a folder.

    Raises:
        ConfigError: a path is no run and holds none.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = user_path(given)
        if path.name == PAGE and path.is_file():
            continue  # of an earlier report: runs/* names it too
        inside = [path] if (path / CONFIG).is_file() else sorted(_inside(path, DEPTH), key=_natural)
        if not inside:
            RunDirectory.open(path)  # says what it is instead
        found |= dict.fromkeys(inside)
    if not found:
        raise ConfigError("There is no run to report. Give runs, or a folder that holds some.")
    return list(found)


def _inside(folder: Path, depth: int) -> Iterable[Path]:
    if not folder.is_dir() or depth == 0:
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.name.startswith("."):
            if (child / CONFIG).is_file():
                yield child
            else:
                yield from _inside(child, depth - 1)


def _natural(path: Path) -> list[tuple[int, float, str]]:
    """Sorts seed-2 before seed-10, and rates by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", str(path))
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts)]


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder that holds all these runs."""
    absolute = [path.absolute().parent for path in paths]
    return Path(os.path.commonpath(absolute))
