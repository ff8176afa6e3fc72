"""Files written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorafa.errors import CheckpointError, LoraError
from lorafa.storage.leavings import hidden, own_file, remove_left_over
from lorafa.storage.parsed import from_json
from lorafa.storage.renames import sync_file, sync_folder


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write to the path this gives; it takes the place of ``path`` only when the block ends without an error.

    The bytes are on the disk before the name changes (fsync, rename, fsync of the folder), so a crash at any moment
    leaves the old file or the new one. After an error the temporary file is gone and the old file is as it was. What
    killed processes have left that wrote the same file is removed.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        with own_file(path.parent, path.name) as temporary:
            yield temporary
            sync_file(temporary)
            _put_in_place(temporary, path)
        remove_left_over(path.parent, glob.escape(path.name))
    except LoraError:  # of what is written: a source that cannot be read is an OSError as well
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}.{free_space(path.parent)} Nothing was changed. "
            "Make room or save to another folder."
        ) from error


def _put_in_place(new: Path, path: Path) -> None:
    """Give a file its name; the one that had it has it again where that cannot be brought to the disk."""
    old, fresh = hidden(path.parent, path.name), not os.path.lexists(path)
    try:
        kept = keep_as(path, old)
        os.replace(new, path)
        try:
            sync_folder(path.parent)
        except OSError:
            if kept:
                os.replace(old, path)
            elif fresh:
                path.unlink()
            raise
    finally:
        with suppress(OSError):
            old.unlink(missing_ok=True)


def keep_as(path: Path, other: Path, *, or_copy: bool = False) -> bool:
    """Give a file a second name, so that it is not lost when another one takes the first; whether it has one now.

    Args:
        or_copy: copy it where the file system knows no second names.
    """
    if not path.is_file():
        return False
    try:
        os.link(path, other)
    except OSError:
        if or_copy:
            shutil.copy2(path, other)
            sync_file(other)
        return or_copy
    return True


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


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make a folder, and those above it, for the length of the block; they stay where it ends without an error, and go
    where it fails and has left nothing in them.

    Raises:
        CheckpointError: as :func:`make_folder`.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        make_folder(path)
        for folder in missing:
            sync_folder(folder.parent)
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def json_text(value: Any) -> str:
    """The json of a value as PEFT writes it: two spaces, sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write the json of ``value``, whole or not at all."""
    text = json_text(value)
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
