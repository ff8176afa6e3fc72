"""Keep freed memory in the process: on CPU, page faults otherwise cost a good part of every training step."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
"""The largest size mallopt can be told, in bytes (it takes an int)."""


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of returning it to the system; True if that is now so.

    By default glibc maps each large block anew and unmaps it when it is freed, so every activation of every step faults
    its pages in again and has them zeroed by the kernel. After this call large blocks come from the heap
    (M_MMAP_THRESHOLD) and the heap is not trimmed (M_TRIM_THRESHOLD); see mallopt(3). The process then keeps its
    peak until it ends: for commands to call when they start, not for libraries.

    Does nothing and returns False where the C library is not glibc, or a glibc that refuses the sizes.
    """
    if not _is_glibc():
        return False
    libc = ctypes.CDLL(None)
    # Both, whatever the first answers: setting either one also stops glibc from adapting the thresholds by itself.
    answers = [libc.mallopt(parameter, _LARGEST) for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(answer == 1 for answer in answers)


def return_freed_memory() -> bool:
    """Give the pages of freed memory back to the system; True if glibc had some to give.

    After :func:`keep_freed_memory` the holes a run has left in the heap may be too small for the next one, and a
    process that does many grows by a part of its peak with each: call this between them. See malloc_trim(3).

    Does nothing and returns False where the C library is not glibc.
    """
    if not _is_glibc():
        return False
    gc.collect()
    return bool(ctypes.CDLL(None).malloc_trim(0))


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
