"""A run that is told to stop between its first and its last write says so in its record, whenever that is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lorafa.conf.compose import compose
from lorafa.errors import CheckpointError, DataError
from lorafa.runs import experiment
from lorafa.runs.experiment import start_run
from lorafa.runs.record import RunDirectory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that only writes."""

    def train(prepared: Any, config: Any, run: Any, console: Any, checkpoint: Any) -> None:
        run.update_result(before={"loss": 2.0})
        run.add_metrics({"step": 1, "loss": 1.0, "seconds": 0.1})
        run.update_result(after={"loss": 1.0}, steps=1)

    prepared = SimpleNamespace(data=SimpleNamespace(sha256="a", source="rows"))
    monkeypatch.setattr(experiment, "prepare", lambda *_: prepared)
    monkeypatch.setattr(experiment, "train", train)


@contextmanager
def at_rename(moment: int, act: Callable[[], None], before: bool) -> Iterator[list[str]]:
    """Do something before or after one of the renames by which files are written."""
    real, seen = os.replace, []

    def replace(old: Any, new: Any, **more: Any) -> None:
        seen.append(Path(new).name)
        mine = len(seen) == moment + 1
        if mine and before:
            act()
        real(old, new, **more)
        if mine and not before:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield seen


def stop() -> None:
    raise KeyboardInterrupt


def full() -> None:
    raise OSError(28, "No space left on device")


def started(run: Path) -> None:
    start_run(compose([f"run_dir={run}"]), Console(quiet=True), ["lorafa"])


def writes(run: Path) -> list[str]:
    with at_rename(-1, stop, before=True) as seen:
        started(run)
    return seen


@pytest.mark.usefixtures("quick")
def test_an_interrupt_is_recorded_at_every_write(tmp_path: Path) -> None:
    names = writes(tmp_path / "whole")
    assert names[0] == "config.yaml"
    assert names[-1] == "result.json"
    assert len(names) >= 7
    for moment in range(len(names)):
        for before in (True, False):
            run = tmp_path / f"{moment}-{before}"
            with at_rename(moment, stop, before), pytest.raises(KeyboardInterrupt):
                started(run)
            if moment == 0 and before:
                assert not run.exists()  # nothing was written
                continue
            result = json.loads((run / "result.json").read_text())
            assert (result["status"], result["error"]) == ("failed", "interrupted"), (moment, before)
            assert RunDirectory.open(run).config().run_dir == str(run)


@pytest.mark.usefixtures("quick")
def test_told_to_stop_twice_it_is_recorded_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail, told = experiment.SharedRun.fail, []

    def interrupted(run: Any, error: str) -> None:
        told.append(error)
        if len(told) == 1:
            raise KeyboardInterrupt
        fail(run, error)

    monkeypatch.setattr(experiment.SharedRun, "fail", interrupted)
    with at_rename(3, stop, before=True), pytest.raises(KeyboardInterrupt):
        started(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["error"] == "interrupted"


@pytest.mark.usefixtures("quick")
def test_the_error_itself_is_heard_of_where_it_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(run: Any, error: str) -> None:
        raise CheckpointError("result.json could not be written: No space left on device.")

    monkeypatch.setattr(experiment.SharedRun, "fail", no_room)
    with at_rename(4, full, before=True), pytest.raises(CheckpointError, match=r"could not be written"):
        started(tmp_path / "full")

    def wrong(*_: Any) -> None:
        raise DataError("a row is bad.")

    monkeypatch.setattr(experiment, "train", wrong)
    with pytest.raises(DataError, match="a row is bad"):
        started(tmp_path / "wrong")


def test_what_fails_before_the_first_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise DataError("a row is bad.")

    monkeypatch.setattr(experiment, "prepare", wrong)
    with pytest.raises(DataError, match="a row is bad"):
        started(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
