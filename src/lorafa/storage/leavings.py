"""What is being written has a hidden name, and is held by its writer: so what a killed one has left can be told.

A lock of the system (flock) goes with the process, however that ends. Where there are none, on Windows and some network
file systems, nothing is ever taken for left over.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.tmp")
_ID = "[0-9a-f]" * 32
_TRIES = 100
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that a writer gives to what is not finished: where nobody writes it, it is left over."""
    return _TEMPORARY.fullmatch(path.name) is not None


def hidden(folder: Path, name: str = "") -> Path:
    """A new name in a folder for what is to be called ``name``, or several things, once it is finished."""
    return folder / f".{name + '.' if name else ''}{uuid.uuid4().hex}.tmp"


@contextmanager
def own_file(folder: Path, name: str) -> Iterator[Path]:
    """A new empty file with a hidden name that this process holds; removed after the block, if it is still there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    for _ in range(_TRIES):
        path = hidden(folder, name)
        with _held_until_left(os.open(path, flags, 0o666), path) as mine:
            try:
                if mine:
                    yield path
                    return
            finally:
                with suppress(OSError):
                    path.unlink()
    raise _busy(folder)


@contextmanager
def own_folder(folder: Path, name: str = "", *, kept: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """A new folder with a hidden name that this process holds; removed after the block, if it is still there.

    Args:
        kept: asked at the end whether it is to stay.
    """
    for _ in range(_TRIES):
        path = hidden(folder, name)
        path.mkdir()
        try:
            with _held_until_left(_opened(path), path) as mine:
                if mine:
                    yield path
                    return
        finally:
            if not kept():
                shutil.rmtree(path, ignore_errors=True)
    raise _busy(folder)


def _busy(folder: Path) -> OSError:
    return OSError(errno.EBUSY, "another process removes what is written there", str(folder))


def _opened(folder: Path) -> int | None:
    """A descriptor of a folder; None where there is none: Windows has none, or another process has just removed it."""
    if os.name == "nt":
        return None
    try:
        return os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None


@contextmanager
def _held_until_left(descriptor: int | None, path: Path) -> Iterator[bool]:
    """Hold what was just made; the answer is False where another process took it for left over before."""
    if os.name == "nt":  # nothing is ever taken for left over there, and a file that is open cannot be renamed
        if descriptor is not None:
            os.close(descriptor)
        yield True
    elif descriptor is None:
        yield False
    else:
        try:
            yield locked(descriptor) is not False and _is_there(descriptor, path)
        finally:
            os.close(descriptor)


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def locked(descriptor: int, *, shared: bool = False) -> bool | None:
    """Take the lock of what is open, for as long as it is: whether it is this process's now, False where it is
    another's; None where there are no locks.

    Args:
        shared: others may have it as well, who share it.
    """
    if os.name == "nt":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def remove_left_over(folder: Path, names: str = "") -> None:
    """Remove what writers that were killed have left in a folder.

    What a living process writes stays, and so does what cannot be removed.

    Args:
        names: what it was to be called, as a pattern of ``glob``; "" for what was to be several files at once.
    """
    with suppress(OSError):
        for left in list(folder.glob(f".{names}{'.' if names else ''}{_ID}.tmp")):
            if not left.is_symlink():
                _remove(left)


def _remove(left: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(left, os.O_RDONLY)
        try:
            if locked(descriptor):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        finally:
            os.close(descriptor)
