"""The control groups of Linux around this process, by which jobs and containers are limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def group_folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 2) of each group that limits this process, from its own up.

    Args:
        root: of the file system.
        controller: what is limited, as version 1 calls it: memory, cpu.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        here = Path(path.lstrip("/"))
        for folder in (here, *here.parents):
            yield base / folder, not controllers


def text_of(path: Path) -> str:
    """What a file holds; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
