"""Names in folders: exchanged in one step where the system can, and brought to the disk."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def exchange(one: Path, other: Path) -> bool:
    """Give each of two files or folders the other's name, in one step; False where that cannot be done.

    Linux can (renameat2) on ext4, XFS, Btrfs, tmpfs and others, not on network file systems.
    """
    call = _renameat2()
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # an older C library
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    found: Callable[[int, bytes, int, bytes, int], int] = call
    return found


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # Windows cannot open a folder; its rename is journaled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Bring the bytes of a file to the disk."""
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def sync_tree(folder: Path) -> None:
    """Bring all files and names below a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(folder)
