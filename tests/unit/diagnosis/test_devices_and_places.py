"""What is said of accelerators, number formats, threads and folders, on machines that are not this one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorafa.diagnosis import devices
from lorafa.diagnosis.finding import Bench, Finding
from lorafa.diagnosis.places import hub_cache, places
from lorafa.diagnosis.trial import Outcome


class Told:
    """A bench whose trials have come to this."""

    def __init__(self, **found: Any) -> None:
        self.found = found

    def outcome(self, job: str) -> Outcome | None:
        return Outcome(value=self.found[job]) if job in self.found else None


def bench(**found: Any) -> Bench:
    return cast(Bench, Told(**found))


def only(findings: Any) -> Finding:
    (finding,) = findings
    return cast(Finding, finding)


def test_each_accelerator_is_named_with_its_memory(tmp_path: Path) -> None:
    two = [{"device": f"cuda:{i}", "name": "H100", "bytes": 80 * 2**30} for i in range(2)]
    told = bench(devices={"found": two, "build": {"cuda": "12.6", "hip": None}})
    assert [(one.subject, one.said) for one in devices.accelerators(told, tmp_path)] == [
        ("cuda:0", "H100, 80.00 GiB"),
        ("cuda:1", "H100, 80.00 GiB"),
    ]


@pytest.mark.parametrize(
    ("device", "build", "said"),
    [
        ("nvidia0", {"cuda": None, "hip": None}, "there is a device of NVIDIA, and this torch is not for it"),
        ("nvidia0", {"cuda": "13.0", "hip": None}, "built for CUDA and cannot use it"),
        ("kfd", {"cuda": "13.0", "hip": None}, "there is a device of AMD, and this torch is not for it"),
    ],
)
def test_a_device_that_torch_cannot_use_is_told(
    device: str, build: Mapping[str, str | None], said: str, tmp_path: Path
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / device).touch()
    found = only(devices.accelerators(bench(devices={"found": [], "build": build}), tmp_path))
    assert (found.state, found.needed) == ("note", False)
    assert said in found.said
    assert "install a torch for" in found.remedy


def test_no_accelerator_is_nothing_bad(tmp_path: Path) -> None:
    found = only(devices.accelerators(bench(devices={"found": [], "build": {"cuda": None, "hip": None}}), tmp_path))
    assert (found.state, found.said) == ("ok", "none: the processor computes")


@pytest.mark.parametrize(
    ("products", "fast"),
    [
        ({"float32": 100.0, "bfloat16": 200.0, "float16": 110.0}, ["bfloat16"]),
        ({"float32": 100.0, "bfloat16": 9.0, "float16": None}, []),
        ({"float32": 100.0, "bfloat16": None, "float16": None}, None),
        ({"float32": None, "bfloat16": 1.0, "float16": None}, None),
    ],
)
def test_fast_is_what_is_clearly_faster_than_float32(products: dict[str, Any], fast: list[str] | None) -> None:
    found = only(devices.formats(bench(speeds={"device": "cuda", "products": products})))
    assert found.facts.get("fast") == fast
    assert ("float32 alone" in found.said) == (not fast)


@pytest.mark.parametrize(
    ("threads", "cores", "quota", "variables", "state", "remedy"),
    [
        (64, 64, 2.0, {}, "note", "OMP_NUM_THREADS=2, or threads=2 of `lorafa train`"),
        (64, 64, 0.5, {}, "note", "OMP_NUM_THREADS=1, or threads=1 of `lorafa train`"),
        (16, 8, None, {"OMP_NUM_THREADS": "16"}, "note", "OMP_NUM_THREADS=8, or threads=8 of `lorafa train`"),
        (1, 16, None, {"OMP_NUM_THREADS": "1"}, "note", "unset OMP_NUM_THREADS, unless several processes share"),
        (8, 8, None, {}, "ok", ""),
        (4, 8, None, {}, "ok", ""),
        (1, 1, 0.5, {}, "ok", ""),
        (3, None, None, {}, "ok", ""),
    ],
)
def test_threads_that_have_no_room_or_leave_some_are_told(
    threads: int,
    cores: int | None,
    quota: float | None,
    variables: dict[str, str],
    state: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in devices.THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "usable_cpus", lambda: cores)
    monkeypatch.setattr(devices, "quota_cpus", lambda: quota)
    found = only(devices.threads(bench(threads={"threads": threads, "between_operations": 1})))
    assert found.state == state
    assert found.remedy.startswith(remedy)
    assert bool(found.remedy) == bool(remedy)


@pytest.mark.parametrize("check", [devices.accelerators, devices.formats, devices.threads])
def test_nothing_is_said_of_what_was_not_tried(check: Any) -> None:
    assert list(check(bench())) == []


# ---- folders


def test_a_cache_that_cannot_be_written_to_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hub"))
    monkeypatch.chdir(tmp_path)
    cache, hub, runs = places(bench())
    assert cache.stops_training
    assert "cannot be written to" in cache.said
    assert cache.remedy == "name another one: LORAFA_CACHE=folder"
    assert (hub.state, hub.stops_training) == ("bad", False)
    assert runs.state == "ok"


def test_looking_makes_no_folder_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "b"))
    monkeypatch.chdir(tmp_path)
    assert {found.state for found in places(bench())} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    cache = next(iter(places(bench())))
    assert cache.said.endswith("has 1.0 MiB of disk left")
    assert cache.remedy == "make room, or name another one: LORAFA_CACHE=folder"


def test_the_hub_s_cache_is_where_its_library_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_cache() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "own"))
    assert hub_cache() == tmp_path / "own"


def test_a_hub_that_is_switched_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [found.subject for found in places(bench())][-1] == "Hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert [found.subject for found in places(bench())][-1] != "Hub"
