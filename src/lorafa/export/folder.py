"""A folder of several files that is there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafa.errors import CheckpointError, ConfigError
from lorafa.storage.whole import free_space, make_folder


def require_free(path: str | Path, *, overwrite: bool) -> Path:
    """The path of a folder to make.

    Raises:
        ConfigError: something is there, and ``overwrite`` is False; or it is no folder.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, and a folder is to be written there. Choose another name.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"The folder {folder} exists and is not empty. Choose another one, or pass --overwrite.")
    return folder


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write to; it takes the place of ``path`` only when the block ends without an error.

    Args:
        overwrite: let it take the place of a folder that is there, which is kept until then.

    Raises:
        ConfigError: as :func:`require_free`.
        CheckpointError: it cannot be written; what was there is as it was.
    """
    folder = require_free(path, overwrite=overwrite)
    make_folder(folder.parent)
    stage = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    old = stage.with_name(f"{stage.name}.old")
    try:
        make_folder(stage)
        yield stage
        try:
            if folder.is_dir():
                os.replace(folder, old)
            os.replace(stage, folder)
        except OSError:
            if old.is_dir() and not folder.exists():
                os.replace(old, folder)
            raise
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(stage), str(folder))) from error
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error.strerror or error}.{free_space(folder.parent)} Nothing was "
            "changed. Make room or choose another place."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
