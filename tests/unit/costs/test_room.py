"""How much memory there is: the least of what the machine and the control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorafa.costs.room import available_bytes, resident_bytes, total_bytes


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:       900 kB\nMemFree:  5 kB\nMemAvailable:   800 kB\n"}


def test_the_machine_has_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert available_bytes(write(tmp_path, MACHINE)) == 800 * 1024


def test_nothing_is_known_where_there_are_no_such_files(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_a_group_around_the_process_counts_and_its_cached_files_are_free(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "0::/jobs/one\n",
        "sys/fs/cgroup/jobs/one/memory.max": "max\n",
        "sys/fs/cgroup/jobs/one/memory.current": "5\n",
        "sys/fs/cgroup/jobs/memory.max": "400000\n",
        "sys/fs/cgroup/jobs/memory.current": "100000\n",
        "sys/fs/cgroup/jobs/memory.stat": "anon 3\ninactive_file 2000\nactive_file 7\n",
    }
    assert available_bytes(write(tmp_path, MACHINE | groups)) == 302_000


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n7:memory:/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "300000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "100000",
        "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 50\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
    }
    assert available_bytes(write(tmp_path, MACHINE | groups)) == 200_050


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    groups = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100",
        "sys/fs/cgroup/memory.current": "200",
    }
    assert available_bytes(write(tmp_path, MACHINE | groups)) == 0


def test_what_the_process_has_grows_with_what_it_writes() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("the system does not tell")
    held = torch.ones(64, 2**20)
    after = resident_bytes()
    assert after is not None
    assert 0.9 * held.nbytes < after - before < 1.2 * held.nbytes


def test_all_memory_is_what_the_machine_has(tmp_path: Path) -> None:
    assert total_bytes(write(tmp_path, MACHINE)) == 900 * 1024
    assert total_bytes(tmp_path / "nowhere") is None
