"""Folders that are there whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafa.errors import CheckpointError, ConfigError, LoraError
from lorafa.storage import renames
from lorafa.storage.leavings import hidden, is_temporary, own_folder, remove_left_over
from lorafa.storage.renames import sync_folder, sync_tree
from lorafa.storage.whole import free_space, new_folder

MARKS = ("config.json", "adapter_config.json", "Modelfile", "*.gguf")
"""Files by one of which a folder is known to hold a model or an adapter, which may be replaced on request."""


@contextmanager
def folder_written_whole(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill the folder this gives; it takes the place of ``path`` only when the block ends without an error.

    All of it is on the disk before it does. After an error, an interrupt among them, it is gone with all that was
    written, and what was at ``path`` is as it was. A folder that is there is exchanged in one step where the file
    system can; else a process that is killed between two renames leaves it beside its place, as ``.<name>.<id>.old``.

    Args:
        overwrite: take the place of a folder that is there and not empty, if it holds a model or an adapter.

    Raises:
        ConfigError: something is there that is not to be replaced.
        CheckpointError: the place cannot be written to, or the disk is full.
    """
    path = require_free(Path(path).absolute(), overwrite=overwrite)
    parent, temporary = path.parent, path
    try:
        with new_folder(parent):
            remove_left_over(parent, glob.escape(path.name))
            with own_folder(parent, path.name) as temporary:
                yield temporary
                sync_tree(temporary)
                require_free(path, overwrite=overwrite)  # again: others may have come first
                _take_place(temporary, path)
    except LoraError as error:
        if temporary != path and str(temporary) in str(error):
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}.{free_space(parent)} Nothing was changed. "
            "Make room, or choose another place."
        ) from error
    for left in parent.glob(f".{glob.escape(path.name)}.*.old"):  # of a process that was killed half-way
        shutil.rmtree(left, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Give a folder its name; after an error the one that had it has it again."""
    if not path.exists() or not any(path.iterdir()):
        _move(new, path)
        return
    if renames.exchange(new, path):
        try:
            sync_folder(path.parent)
        except BaseException:
            renames.exchange(new, path)
            raise
        return
    old = hidden(path.parent, path.name).with_suffix(".old")
    try:
        os.rename(path, old)  # who is killed before the next line has this left
        _move(new, path)
    except BaseException:
        if old.exists() and not os.path.lexists(path):
            os.rename(old, path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _move(new: Path, path: Path) -> None:
    """Rename a folder to a name that is free, or that of an empty folder; taken back after an error."""
    empty = path.exists()
    if empty and os.name == "nt":
        path.rmdir()
    os.rename(new, path)
    try:
        sync_folder(path.parent)
    except BaseException:
        os.rename(path, new)
        if empty:
            with suppress(OSError):
                path.mkdir()
        raise


def require_apart(out: Path, read: Mapping[str, Sequence[Path]]) -> None:
    """Raises ConfigError where the folder to be written is, or holds, what is read.

    Args:
        read: what it is, in words -> folders or files; those that are not there are passed over.
    """
    target = out.resolve()
    for what, places in read.items():
        for place in places:
            if place.exists() and place.resolve().is_relative_to(target):
                raise ConfigError(f"{out} is, or holds, {what} ({place}), which is read. Choose another folder.")


def require_free(path: str | Path, *, overwrite: bool | None) -> Path:
    """The path of a folder that may be made.

    Args:
        overwrite: as for :func:`folder_written_whole`; None where nothing is ever replaced.

    Raises:
        ConfigError: a file, or a folder that is not to be replaced, is there.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return path
    if not path.is_dir() or path.is_symlink():
        raise ConfigError(f"{path} is no folder. Choose another place.")
    try:
        if all(map(is_temporary, path.iterdir())):  # of a writer that was killed, or is at it
            return path
    except OSError as error:
        raise ConfigError(f"{path} cannot be looked into: {error.strerror or error}. Choose another place.") from error
    if overwrite is None:
        raise ConfigError(f"{path} exists and is not empty, and nothing is overwritten. Choose another place.")
    if not overwrite:
        raise ConfigError(
            f"{path} exists and is not empty. Choose another place, or replace it (--overwrite, overwrite=True)."
        )
    if not any(any(path.glob(mark)) for mark in MARKS):
        raise ConfigError(
            f"{path} is not the folder of a model or an adapter (none of {', '.join(MARKS)} is in it), so it is not "
            "replaced. Choose another place."
        )
    return path
