"""Files written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafa.errors import CheckpointError, ConfigError, LoraError
from lorafa.storage.parsed import from_json

MARKS = ("config.json", "adapter_config.json", "Modelfile", "*.gguf")
"""Files by one of which a folder is known to hold a model or an adapter, which may be replaced on request."""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write to the path this gives; it takes the place of ``path`` only when the block ends without an error.

    The bytes are on the disk before the name changes (fsync, rename, fsync of the folder), so a crash at any moment
    leaves the old file or the new one. After an error the temporary file is gone and the old file is as it was.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except LoraError:  # of what is written: a source that cannot be read is an OSError as well
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}.{free_space(path.parent)} Nothing was changed. "
            "Make room or save to another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files take their places in ``folder`` together, once all of them are written."""
    stage = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        make_folder(stage)
        yield stage
        for path in stage.iterdir():
            os.replace(path, folder / path.name)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(stage), str(folder))) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def folder_written_whole(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill the folder this gives; it takes the place of ``path`` only when the block ends without an error.

    After an error, an interrupt among them, it is gone with all that was written, and what was at ``path`` is as it
    was. The files are to be on the disk (fsync) when the block ends.

    Args:
        overwrite: take the place of a folder that is there and not empty, if it holds a model or an adapter.

    Raises:
        ConfigError: something is there that is not to be replaced.
        CheckpointError: the place cannot be written to, or the disk is full.
    """
    path = require_free(Path(path).absolute(), overwrite=overwrite)
    parent = make_folder(path.parent)
    temporary = parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        _remove_left_over(path)
        temporary.mkdir()
        with _held(temporary):
            yield temporary
            for file in (each for each in temporary.rglob("*") if each.is_file()):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            _sync_folder(temporary)
            require_free(path, overwrite=overwrite)  # again: others may have come first
            _take_place(temporary, path)
            _sync_folder(parent)
    except LoraError as error:
        if str(temporary) in str(error):
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}.{free_space(parent)} Nothing was changed. "
            "Make room, or choose another place."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder for the length of the block, or until the process is killed; whether it could be held.

    It cannot where another process holds it. On Windows nothing is held and the answer is True.
    """
    if os.name == "nt":
        yield True
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:  # another process has it, or the file system knows no locks
            free = False
        yield free
    finally:
        os.close(descriptor)


def _remove_left_over(path: Path) -> None:
    """Remove what processes that were killed while they wrote the folder ``path`` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp") if os.name != "nt" else ():
        if is_temporary(left) and left.is_dir() and not left.is_symlink():
            with _held(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)


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
    if not any(path.iterdir()):
        return path
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


def _take_place(new: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        if path.exists():
            path.rmdir()
        os.rename(new, path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")  # who is killed before the next line has this left
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file is one that :func:`written_whole` was writing: where nobody does any more, it is left over."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is journaled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> str:
    """How much room is left, as a sentence with a blank before it; nothing where the system does not tell."""
    try:
        return f" {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there."
    except OSError:
        return ""


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents, if they are not there yet.

    Raises:
        CheckpointError: a file is in the way, or the place cannot be written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CheckpointError(f"{folder} is a file, not a folder. Choose a folder to save to.") from error
    except OSError as error:
        raise CheckpointError(
            f"The folder {folder} could not be made: {error.strerror or error}. Choose another place."
        ) from error
    return folder


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as PEFT does (two spaces, sorted keys), whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object a json file holds.

    Raises:
        CheckpointError: no such file, not json, or no object (``{...}``) at the top.
    """
    try:
        value = from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}. Check the path.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a json file: {error}. It may be cut off: fetch or save it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, expected an object {{...}}. Is it the right file?"
        )
    return value
