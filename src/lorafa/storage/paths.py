"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(written: str | Path) -> Path:
    """The path, with ~ as the home folder. That of a user whom nobody knows stays as it is, and is not found then."""
    return Path(os.path.expanduser(written))
