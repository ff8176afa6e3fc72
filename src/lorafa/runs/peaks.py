"""The most memory a run has held: of the process, and of its accelerators.

A process keeps its high-water mark for as long as it lives, and several runs may live in one, so the mark is set back
where a run begins. Linux alone lets a process do that (5 into /proc/self/clear_refs, see proc(5)), and not every system
that looks like it does; elsewhere the figure is the process's, unless nothing more was held before, and the record says
so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

CLEAR, STATUS, STATM = (Path("/proc/self") / name for name in ("clear_refs", "status", "statm"))
SLACK = 8 * 2**20
"""Bytes by which the two may differ, which are counted apart and some pages late."""
RUN, PROCESS = "run", "process"
"""Whose peak it is: the run's own, or that of the process, which may have held more before."""


class Peaks:
    """The marks as they are set back when this is made."""

    def __init__(self) -> None:
        self.scope = RUN if _set_back() else PROCESS
        self._accelerator = _accelerator()
        if self._accelerator is not None:
            _each(self._accelerator, "reset_peak_memory_stats")

    def measured(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """``peak_rss_bytes``, ``peak_rss_of`` (run or process) and, with an accelerator, ``peak_device_bytes``.

        Args:
            earlier: the result of the parts of the run before this one; the largest of all counts.
        """
        resident = peak_rss_bytes()
        scopes = {self.scope} | ({earlier.get("peak_rss_of", PROCESS)} if earlier.get("peak_rss_bytes") else set())
        device = None
        if self._accelerator is not None:
            device = sum(_each(self._accelerator, "max_memory_allocated"))
        return {
            "peak_rss_bytes": _largest(resident, earlier.get("peak_rss_bytes")),
            "peak_rss_of": PROCESS if PROCESS in scopes or resident is None else RUN,
            "peak_device_bytes": _largest(device, earlier.get("peak_device_bytes")),
        }


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process, since the mark was last set back where that can be; None where the
    system does not tell."""
    with suppress(OSError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _set_back() -> bool:
    """Whether the mark now says no more than what is held at this moment."""
    with suppress(OSError):
        CLEAR.write_text("5", encoding="ascii")
    held, peak = _held(), peak_rss_bytes()
    return held is not None and peak is not None and peak - held < SLACK


def _held() -> int | None:
    """Resident memory at this moment; None where the system does not tell."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _accelerator() -> Any:
    """What counts the memory of this process's accelerators: torch.accelerator, or torch.cuda before it; None without.
    """
    general = getattr(torch, "accelerator", None)
    if general is not None and hasattr(general, "max_memory_allocated"):
        kind = general.current_accelerator() if general.is_available() else None
        return general if kind is not None and kind.type in ("cuda", "xpu") else None  # others do not count
    return torch.cuda if torch.cuda.is_available() else None


def _each(accelerator: Any, function: str) -> list[Any]:
    """The function for every device of the process; none where nothing has been allocated on any."""
    if accelerator is torch.cuda and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [getattr(accelerator, function)(index) for index in range(accelerator.device_count())]


def _largest(*sizes: int | None) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(known) if known else None
