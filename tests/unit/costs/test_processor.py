"""How much of the processor a process may use: the least that the groups around it leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.costs.processor import cpu_name, quota_cpus, usable_cpus

SECOND = {"proc/self/cgroup": "0::/jobs/one\n"}
FIRST = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n7:memory:/other\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (SECOND, None),
        (SECOND | {"sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n"}, None),
        (SECOND | {"sys/fs/cgroup/jobs/one/cpu.max": "150000 100000\n"}, 1.5),
        (
            SECOND
            | {"sys/fs/cgroup/jobs/one/cpu.max": "400000 100000\n", "sys/fs/cgroup/jobs/cpu.max": "200000 100000\n"},
            2.0,
        ),
        (
            FIRST
            | {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            None,
        ),
        (
            FIRST
            | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            0.5,
        ),
    ],
    ids=["no groups", "no limit", "max", "one and a half", "one around it has less", "first version", "half"],
)
def test_a_quota_is_the_least_of_all_groups(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cpus(tmp_path) == quota


def test_the_processor_has_a_name_and_a_number() -> None:
    assert cpu_name()
    assert (usable_cpus() or 1) >= 1
