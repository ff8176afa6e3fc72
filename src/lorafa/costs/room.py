"""How much memory there is for a process, and how much it has: read from the files of Linux, unknown elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lorafa.costs.control_groups import group_folders, text_of

_NO_LIMIT = 2**60
"""What version 1 of control groups writes where there is none is larger."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes a process can have without swapping, or being ended for it: what the machine has left, or its control
    group, or one of those around it, where that is less. None where the system does not tell.

    Memory that only caches files counts as free: the system gives it back when it is asked for more.
    """
    found = [size for size in (_of_machine(root), *_of_groups(root)) if size is not None]
    return min(found) if found else None


def resident_bytes() -> int | None:
    """Bytes this process has in memory now; None where the system does not tell."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", text_of(Path("/proc/self/status")), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def total_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory that the machine has, whatever is used of it; None where the system does not tell."""
    return _of_machine(root, "MemTotal")


def _of_machine(root: Path, name: str = "MemAvailable") -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _of_groups(root: Path) -> Iterator[int | None]:
    """What each control group of this process leaves it, from its own up."""
    for folder, second in group_folders(root, "memory"):
        if second:
            yield _left(folder, "memory.max", "memory.current", "inactive_file")
        else:
            yield _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(group: Path, limit_file: str, used_file: str, cached: str) -> int | None:
    limit, used = text_of(group / limit_file).strip(), text_of(group / used_file).strip()
    if not limit.isdigit() or not used.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    files = re.search(rf"^{cached} (\d+)$", text_of(group / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(used) + (int(files[1]) if files else 0))
