"""The processor: what it is called, and how much of it a process may use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from lorafa.costs.control_groups import group_folders, text_of


def usable_cpus() -> int | None:
    """Processors this process may run on; None where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def quota_cpus(root: Path = Path("/")) -> float | None:
    """Processors whose time the control groups around this process leave it, 1.5 for example; None: no group limits it.

    A process may run on more of them at the same time, and then waits for the rest of each period.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    for folder, second in group_folders(root, "cpu"):
        if second:
            words = text_of(folder / "cpu.max").split()
        else:
            words = [text_of(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # "max" and -1: no limit
            yield int(words[0]) / int(words[1])


def cpu_name() -> str:
    """What the processor calls itself."""
    lines = text_of(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
