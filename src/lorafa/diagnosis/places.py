"""Folders that commands write to: whether they can, and how much room is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorafa.costs.sizes import size
from lorafa.diagnosis.finding import Bench, Finding
from lorafa.storage.paths import user_path
from lorafa.storage.wheels import default_cache_dir

LITTLE = 2 * 2**30
"""Bytes of disk below which a place is short: the smallest model known by name takes 0.4 GiB while it is fetched."""


def places(bench: Bench) -> Iterator[Finding]:
    """The cache of lorafa, that of the Hub, and where runs are written."""
    yield _place("cache", default_cache_dir(), "name another one: LORAFA_CACHE=folder", needed=True)
    yield _place("Hub's cache", hub_cache(), "name another one: HF_HOME=folder")
    yield _place("runs here", Path.cwd() / "runs", "name another place: run_dir=folder/run of `lorafa train`")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding(
            subject="Hub", state="note", said="HF_HUB_OFFLINE is set: models and data sets come from the cache alone",
            remedy="unset it to fetch",
        )  # fmt: skip


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetches, by the variables it goes by."""
    if chosen := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return user_path(chosen)
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return user_path(home) / "hub"


def _place(subject: str, folder: Path, otherwise: str, *, needed: bool = False) -> Finding:
    facts = {"folder": str(folder), "there": folder.is_dir()}
    try:
        nearest = _nearest(folder)
        with tempfile.TemporaryFile(dir=nearest):  # leaves nothing, and makes no folder
            pass
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        said = f"{folder} cannot be written to: {error.strerror or error}"
        return Finding(subject=subject, state="bad", said=said, remedy=otherwise, needed=needed, facts=facts)
    facts["free"] = free
    if free < LITTLE:
        said = f"{folder} has {size(free)} of disk left"
        return Finding(subject=subject, state="note", said=said, remedy=f"make room, or {otherwise}", facts=facts)
    return Finding(subject=subject, state="ok", said=f"{folder}, {size(free)} of disk left", facts=facts)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one around it that is there.

    Raises:
        NotADirectoryError: a file stands in its way.
    """
    for place in (folder, *folder.parents):
        if place.is_dir():
            return place
        if os.path.lexists(place):
            raise NotADirectoryError(20, f"{place} is no folder")
    return Path(folder.anchor)
