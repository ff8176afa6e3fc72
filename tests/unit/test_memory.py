"""Freed memory stays with the process where glibc allows it, and nothing happens elsewhere."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lorafa.train.memory import keep_freed_memory

COUNT_FAULTS = """
import resource, sys
import torch
from lorafa.train.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    for mebibytes in (1, 16, 48):
        torch.ones(mebibytes * 2**18)

step()  # the first step touches fresh pages either way
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Page faults of five steps that allocate and free 65 MiB each, in a process of their own."""
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    assert faults("keep") < faults("default") / 2


@pytest.mark.parametrize(("system", "libc"), [("darwin", ""), ("win32", ""), ("linux", "musl")])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, system: str, libc: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the C library was loaded"))
    assert keep_freed_memory() is False


HOLDS = """
from pathlib import Path
import torch
from lorafa.train.memory import keep_freed_memory, return_freed_memory

def held():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

keep_freed_memory()
block, mark = torch.ones(2**27), torch.ones(2**18)  # 512 MiB, and a MiB above it in the heap
del block
before = held()
return_freed_memory()
print(before - held())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_can_be_returned_between_runs() -> None:
    run = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 400
