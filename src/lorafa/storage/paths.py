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


def why_not_made(path: Path, there: Path) -> str | None:
    """Why no file system takes a path below a folder that is there, in words; None where it does."""
    try:
        longest, whole = max(len(os.fsencode(part)) for part in path.parts), len(os.fsencode(path))
        most = [os.pathconf(there, name) for name in ("PC_NAME_MAX", "PC_PATH_MAX")]
    except UnicodeEncodeError:
        return "it is no text"
    except (OSError, ValueError, AttributeError):  # Windows has other limits
        return None
    if longest > most[0]:
        return f"a name in it has {longest} bytes, and {most[0]} is the most there"
    return f"it has {whole} bytes, and {most[1] - 1} is the most there" if whole >= most[1] else None


def user_path(written: str | Path) -> Path:
    """The path, with ~ as the home folder. That of a user whom nobody knows stays as it is, and is not found then."""
    return Path(os.path.expanduser(written))
