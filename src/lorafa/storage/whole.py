"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafa.errors import CheckpointError, LoraError


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
        value = json.loads(Path(path).read_text(encoding="utf-8"))
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
