"""Runs whose process is killed while it writes, or whose disk is full: nothing lost, and the same command goes on."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from toys.processes import STARTS
from toys.workplace import make_workplace, metrics, read, settings

STEPS = ["train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=1", "eval.size=0", "if_exists=resume"]
STEPS += ["train.eval_every=2", "train.keep_best=true"]
LIMIT = 200
"""Seconds after which a process that should be done has failed."""
WRITES = ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree")


def command(workplace: Path, run: Path, log: Path, before: Callable[[Path], None] | None = None, *more: Any) -> None:
    """The run in a process of its own, which says what it says into a file."""
    from lorafa.cli.main import main

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if before is not None:
        before(run, *more)
    sys.exit(main(["train", *settings(workplace, run), *STEPS]))


def kill_at(run: Path, moment: int, count: Any, by: signal.Signals = signal.SIGKILL) -> None:
    """Count each step of writing in the run directory, and end this process at one of them, unprepared."""
    seen = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event in WRITES or (event == "open" and details[1] is not None and set("wax+") & set(str(details[1])))
        if not writes or str(run) not in str(details[0]):
            return
        seen += 1
        count.value = seen
        if seen == moment:
            os.kill(os.getpid(), by)

    sys.addaudithook(hook)


def no_larger_than(run: Path, size: int) -> None:
    """No file grows beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def ended(*arguments: Any) -> int:
    process = STARTS.Process(target=command, args=arguments)
    process.start()
    process.join(timeout=LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the run hangs")
    return process.exitcode


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def whole(workplace: Path) -> tuple[Path, int]:
    """A run that nothing happened to, and how many steps of writing it took."""
    run, count = workplace / "whole", STARTS.Value("i", 0)
    assert ended(workplace, run, workplace / "log", kill_at, -1, count) == 0
    return run, count.value


def assert_goes_on_as(workplace: Path, run: Path, other: Path) -> None:
    log = workplace / "again.log"
    assert ended(workplace, run, log) == 0, log.read_text()
    assert [row["loss"] for row in metrics(run) if "loss" in row] == [
        row["loss"] for row in metrics(other) if "loss" in row
    ]
    assert read(run / "result.json")["after"] == read(other / "result.json")["after"]
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, other))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


MOMENTS = 24
"""Moments of a run at which it is killed, evenly over what it writes; the quick tests take every twelfth."""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX feature")
@pytest.mark.parametrize(
    "moment", [pytest.param(n, marks=() if n % 12 == 2 else pytest.mark.slow) for n in range(MOMENTS)]
)
def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(
    workplace: Path, whole: tuple[Path, int], tmp_path: Path, moment: int
) -> None:
    other, writes = whole
    at = 1 + moment * (writes - 1) // (MOMENTS - 1)
    run = tmp_path / "run"
    status = ended(workplace, run, tmp_path / "log", kill_at, at, STARTS.Value("i", 0))
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert_goes_on_as(workplace, run, other)


@pytest.mark.parametrize("moment", [pytest.param(n, marks=() if n == 9 else pytest.mark.slow) for n in range(3, 20)])
def test_a_run_told_to_stop_while_it_writes_goes_on_as_if_nothing_had_happened(
    workplace: Path, whole: tuple[Path, int], tmp_path: Path, moment: int
) -> None:
    other, writes = whole
    run, at = tmp_path / "run", 1 + moment * (writes - 1) // (MOMENTS - 1)
    assert ended(workplace, run, tmp_path / "log", kill_at, at, STARTS.Value("i", 0), signal.SIGTERM) == 130
    assert read(run / "result.json")["error"] == "interrupted"
    assert_goes_on_as(workplace, run, other)


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a POSIX feature")
@pytest.mark.parametrize("size", [10_000, pytest.param(18_000, marks=pytest.mark.slow), 25_000])
def test_a_full_disk_is_said_and_what_was_there_is_kept(
    workplace: Path, whole: tuple[Path, int], tmp_path: Path, size: int
) -> None:
    other, _ = whole
    run, log = tmp_path / "run", tmp_path / "log"
    status = ended(workplace, run, log, no_larger_than, size)
    said = " ".join(log.read_text(errors="replace").split())
    assert status == 1, said
    assert "could not be written: " in said
    assert "not foreseen" not in said
    assert_goes_on_as(workplace, run, other)
