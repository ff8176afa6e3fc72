"""A comparison that is killed at any write goes on; one with another plan is refused while it is at work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lorafa.errors import ConfigError
from lorafa.runs import experiment
from lorafa.runs.comparison import Choice, compare, rows
from lorafa.runs.experiment import start_run
from lorafa.runs.plan import RESULT, Plan
from lorafa.storage.whole import read_json
from toys.comparisons import BEST, Fake, compose_once, plan_file
from toys.faults import KILLS, every_fault

ONE = {"methods": {"lora": {"settings": ["optim=adamw"], "rates": [1e-3]}}, "seeds": [0, 1]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that only write."""

    def train(prepared: Any, config: Any, run: Any, console: Any, checkpoint: Any) -> None:
        run.update_result(samples_sha256="a" * 64, parameters={"trainable": 7, "all": 9})
        for step in (1, 2):
            run.add_metrics({"step": step, "loss": 1.0, "seconds": 0.1 * step})
        run.update_result(after={"loss": 1.0 + config.train.seed}, steps=2)

    prepared = SimpleNamespace(data=SimpleNamespace(sha256="a" * 64, source="rows"))
    monkeypatch.setattr(experiment, "prepare", lambda *_: prepared)
    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "environment", lambda command: {"command": list(command)})
    compose_once(monkeypatch)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the harness looks descriptors up there")
@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_it_goes_on_whenever_it_was_killed(tmp_path: Path, every: int) -> None:
    plan, place, nothing = Plan.read(plan_file(tmp_path, **ONE)), tmp_path / "place", tmp_path / "nothing"
    nothing.mkdir()

    def work(folder: Path) -> None:
        compare(plan, folder, Console(quiet=True), start=start_run)

    count = 0
    for spoiled in every_fault(nothing, place, work, KILLS, every):
        count += 1
        work(place)
        (row,) = read_json(place / RESULT)["methods"]
        assert (row["seeds"], row["loss"]["values"]) == (2, [1.0, 2.0]), spoiled.what
    assert count > 3


def test_what_a_killed_run_leaves_before_its_settings_is_no_run(tmp_path: Path) -> None:
    plan, run = Plan.read(plan_file(tmp_path, **ONE)), tmp_path / "place" / "lora" / "lr-0.001-seed-0"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / f".config.yaml.{'0' * 32}.tmp").write_text("half")
    (row,) = compare(plan, tmp_path / "place", Console(quiet=True), start=start_run)
    assert row["seeds"] == 2
    assert sorted(path.name for path in run.iterdir())[:2] == [".lock", "config.yaml"]


def test_another_plan_is_refused_meanwhile(tmp_path: Path) -> None:
    plan, folder, console = Plan.read(plan_file(tmp_path, **ONE)), tmp_path / "place", Console(quiet=True)
    other = Plan.read(plan_file(tmp_path, **{**ONE, "settings": ["train.steps=30"]}))
    fake, seen = Fake(BEST), []

    def start(config: Any, *arguments: Any, **more: Any) -> Path:
        if not seen:
            for text, words in (("another plan", []), ("other settings", ["peft.r=3"])):
                with pytest.raises(ConfigError, match=rf"place is taken: another process is at .*{text}"):
                    compare(other if not words else plan, folder, console, words, start=fake)
            seen.append(True)
        return fake(config, *arguments, **more)

    compare(plan, folder, console, start=start)
    assert seen
    shutil.rmtree(folder / "lora")
    compare(other, folder, console, start=Fake(BEST))  # it has ended


def test_methods_stand_in_the_order_of_the_plan(tmp_path: Path) -> None:
    """Whichever is chosen first, as by several processes."""
    plan = Plan.read(plan_file(tmp_path))
    names = [method.name for method in plan.methods]
    chosen = {name: Choice(1e-3, False, False) for name in reversed(names)}
    assert [row["method"] for row in rows(plan, tmp_path, chosen)] == names
