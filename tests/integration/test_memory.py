"""Freed memory stays with the process where glibc allows it, and nothing happens elsewhere."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lorafa.train.memory import keep_freed_memory

FREED = """
from pathlib import Path
import torch
from lorafa.train.memory import keep_freed_memory, return_freed_memory

def held():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

print(keep_freed_memory() if {keep} else True)
block, mark = torch.ones(2**27), torch.ones(2**18)  # 512 MiB, and a MiB above it in the heap
full = held()
del block
freed = held()
if {give_back}:
    return_freed_memory()
print(full - freed, freed - held())
"""


def given_up(*, keep: bool, give_back: bool = False) -> tuple[int, int]:
    """MiB that leave a process of its own when it frees a block of 512, and when it gives back what it has freed."""
    code = FREED.format(keep=keep, give_back=give_back)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    worked, freed, returned = run.stdout.split()
    assert worked == "True"
    return int(freed), int(returned)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_and_can_be_returned_between_runs() -> None:
    """glibc maps blocks above 32 MiB, and unmaps them when they are freed, unless it is told not to."""
    assert given_up(keep=False)[0] > 500
    freed, returned = given_up(keep=True, give_back=True)
    assert freed < 12
    assert returned > 400


@pytest.mark.parametrize(("system", "libc"), [("darwin", ""), ("win32", ""), ("linux", "musl")])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, system: str, libc: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the C library was loaded"))
    assert keep_freed_memory() is False
