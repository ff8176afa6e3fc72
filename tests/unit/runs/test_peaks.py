"""Peaks of memory are the run's own where the system lets that be known, and the largest of all its parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafa.runs import peaks
from lorafa.runs.peaks import PROCESS, RUN, Peaks, peak_rss_bytes
from lorafa.train.memory import return_freed_memory

MIB = 2**20


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_rss_bytes()
    assert peak is not None
    assert 50 * MIB < peak < 2**45  # a Python with PyTorch takes more than 50 MiB


def test_a_light_run_does_not_carry_the_peak_of_a_heavy_one_before_it() -> None:
    """Or it says that its peak is that of the process."""
    first = Peaks()
    block = bytearray(b"x" * (256 * MIB))
    heavy = first.measured({})
    del block
    return_freed_memory()  # as between the runs of a comparison
    light = Peaks().measured({})
    if light["peak_rss_of"] == RUN:
        assert heavy["peak_rss_bytes"] - light["peak_rss_bytes"] > 200 * MIB
    else:
        assert light["peak_rss_bytes"] >= heavy["peak_rss_bytes"]


class System:
    """The three files of /proc/self, of a system that may or may not set the mark back."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = {name: folder / name for name in ("clear_refs", "status", "statm")}
        for name, path in zip(("CLEAR", "STATUS", "STATM"), self.files.values(), strict=True):
            monkeypatch.setattr(peaks, name, path)

    def holds(self, now: int, peak: int) -> None:
        self.files["statm"].write_text(f"9999 {now * MIB // os.sysconf('SC_PAGE_SIZE')} 1 1 0 1 0\n")
        self.files["status"].write_text(f"Name:\tpython\nVmHWM:\t{peak * 1024} kB\nVmRSS:\t{now * 1024} kB\n")


@pytest.mark.parametrize(("after", "scope"), [(300, RUN), (7597, PROCESS)])
def test_whether_the_mark_was_set_back_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, scope: str
) -> None:
    system = System(tmp_path, monkeypatch)
    system.holds(300, after)
    run = Peaks()
    assert system.files["clear_refs"].read_text() == "5"
    system.holds(300, max(after, 789))
    assert run.measured({}) == {
        "peak_rss_bytes": max(after, 789) * MIB, "peak_rss_of": scope, "peak_device_bytes": None
    }  # fmt: skip


def test_where_there_is_no_such_file_the_peak_is_the_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    System(tmp_path / "none", monkeypatch)
    found = Peaks().measured({})
    assert found["peak_rss_of"] == PROCESS
    assert found["peak_rss_bytes"] > 50 * MIB


def test_after_a_resume_the_largest_part_counts() -> None:
    earlier = {"peak_rss_bytes": 2**45, "peak_rss_of": RUN, "peak_device_bytes": 7}
    found = Peaks().measured(earlier)
    assert (found["peak_rss_bytes"], found["peak_device_bytes"]) == (2**45, 7)
    assert Peaks().measured({"peak_rss_bytes": 1})["peak_rss_of"] == PROCESS  # of a version that did not say


def test_the_memory_of_all_accelerators_is_counted_from_where_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Accelerator:
        """Two devices that hold what they were last told."""

        def __init__(self) -> None:
            self.peaks = [9, 9]

        def device_count(self) -> int:
            return 2

        def reset_peak_memory_stats(self, index: int) -> None:
            self.peaks[index] = 1

        def max_memory_allocated(self, index: int) -> int:
            return self.peaks[index]

    device = Accelerator()
    monkeypatch.setattr(peaks, "_accelerator", lambda: device)
    run = Peaks()
    device.peaks[1] = 5
    assert run.measured({})["peak_device_bytes"] == 6
