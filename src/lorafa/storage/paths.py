"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def is_inside(name: object) -> bool:
    """Whether a name that a file gives is that of a file in its own folder, or in one below it: it leads nowhere else.

    Links are not followed: caches hold files as links.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or len(name.encode()) > 1000:
        return False
    parts = name.replace("\\", "/").split("/")
    return not {"", ".", ".."} & set(parts) and ":" not in parts[0] and all(len(part.encode()) < 256 for part in parts)


def user_path(written: str | Path) -> Path:
    """The path, with ~ as the home folder. That of a user whom nobody knows stays as it is, and is not found then."""
    return Path(os.path.expanduser(written))
