"""What a folder in the cache was made of, written beside it: so that a wrong model is never used in silence.

The manifest lies in the folder it speaks of, so it guards against damage and mixtures, not against somebody who means
harm: nothing in such a folder is executed.
"""

from __future__ import annotations

from pathlib import Path

from lorafa.errors import CheckpointError, SourceError, shorten
from lorafa.storage.wheels import Wheel, sha256_of
from lorafa.storage.whole import read_json, write_json

NAME = "manifest.json"


def write_manifest(folder: Path, wheel: Wheel) -> None:
    """Record the wheel a finished folder was made from, and the SHA-256 of each of its files."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_json(folder / NAME, {"made_from": wheel.sha256, "files": files})


def check_manifest(folder: Path, wheel: Wheel) -> None:
    """The folder is what was made from this wheel, file by file; 270 MB take about half a second.

    Raises:
        SourceError: a file is missing, another one, or was added; or it was made from another wheel.
    """
    if problem := _problem(folder, wheel):
        raise SourceError(f"The cached model {folder} {problem}. Delete that folder and run again.")


def _problem(folder: Path, wheel: Wheel) -> str | None:
    try:
        manifest = read_json(folder / NAME) if (folder / NAME).is_file() else None
    except CheckpointError:
        manifest = {}
    if manifest is None:
        return f"lacks {NAME}, so that nothing says what it was made of"
    made_from, files = manifest.get("made_from"), manifest.get("files")
    if not isinstance(made_from, str) or not isinstance(files, dict):
        return f"has a damaged {NAME}"
    if made_from != wheel.sha256:
        return f"was made from another wheel than {wheel.requirement}"
    if missing := [name for name in files if not (folder / name).is_file()]:
        return f"lacks {shorten(missing)}"
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if more := sorted(present - files.keys() - {NAME}):
        return f"holds {shorten(more)} besides what it was made of"
    other = [name for name, digest in files.items() if sha256_of(folder / name) != digest]
    return f"holds another {shorten(other)} than was made" if other else None
