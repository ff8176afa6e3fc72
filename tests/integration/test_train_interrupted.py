"""Runs that were stopped: what they leave, what they say, and that they are continued as the run they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafa.cli.main import main
from lorafa.train import recipe
from toys.workplace import at_step, interrupt, make_workplace, metrics, read, settings

Act = Callable[[], None]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def err(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def cut(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run interrupted after step 6 with a checkpoint at 4, on its own copy of the rows."""
    shutil.copy(workplace / "rows.jsonl", tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 6, interrupt)
        rows = f"data={tmp_path / 'rows.jsonl'}"
        assert main(["train", *settings(workplace, tmp_path / "cut"), rows, "train.steps=8", "eval.size=0"]) == 130
    return tmp_path / "cut"


def test_an_interrupted_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str], cut: Path) -> None:
    result = read(cut / "result.json")
    assert (result["status"], result["error"]) == ("failed", "interrupted")
    out = capsys.readouterr().out
    assert f"Continue from checkpoint-4 with: lorafa train train.resume={cut}\n" in out


def test_a_run_interrupted_before_its_first_checkpoint_says_that(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 2, interrupt)
    assert main(["train", *settings(workplace, tmp_path / "run"), "eval.size=0"]) == 130
    assert "There is no checkpoint yet to continue from (train.checkpoint_every)." in capsys.readouterr().out


def test_a_run_told_to_stop_ends_as_an_interrupted_one(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", *settings(workplace, tmp_path / "run"), "eval.size=0"]) == 130
    assert read(tmp_path / "run" / "result.json")["error"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_continued_run_does_not_carry_the_old_error(
    cut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    at_step(monkeypatch, 7, lambda: seen.append(read(cut / "result.json")))
    assert main(["train", f"train.resume={cut}"]) == 0
    assert [(result["status"], result["error"]) for result in seen] == [("running", None)]


def test_a_run_cut_short_after_its_last_step_takes_no_step_more(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = recipe.measure

    def measure(prepared: Any, config: Any, console: Any, when: str) -> dict[str, Any]:
        if when == "After":
            interrupt()
        return original(prepared, config, console, when)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "measure", measure)
        short = ["train.steps=6", "train.checkpoint_every=3", "eval.size=0"]  # an epoch has four steps
        assert main(["train", *settings(workplace, run), *short]) == 130
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    assert main(["train", f"train.resume={run}"]) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, 7))
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert [name for name in trained if not torch.equal(trained[name], again[name])] == []
    assert read(run / "result.json")["steps"] == 6
    assert not (run / "checkpoints" / "checkpoint-7").exists()


def test_a_continued_run_has_the_time_and_the_peak_of_all_its_parts(cut: Path) -> None:
    first = read(cut / "result.json")
    assert first["seconds"]["total"] > 0
    known = first | {"seconds": first["seconds"] | {"total": 1000.0}, "peak_rss_bytes": 2**45}
    (cut / "result.json").write_text(json.dumps(known))
    assert main(["train", f"train.resume={cut}"]) == 0
    result = read(cut / "result.json")
    assert 1000 < result["seconds"]["total"] < 1100
    assert result["peak_rss_bytes"] == 2**45


def test_a_part_that_was_killed_counts_with_what_it_has_recorded(cut: Path) -> None:
    """It has written no total; the total of all is never less than the training."""
    rows = [row | {"seconds": row["seconds"] + 500} for row in metrics(cut)]
    (cut / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {name: value for name, value in read(cut / "result.json")["seconds"].items() if name != "total"}
    (cut / "result.json").write_text(json.dumps(read(cut / "result.json") | {"seconds": seconds}))
    assert main(["train", f"train.resume={cut}"]) == 0
    seconds = read(cut / "result.json")["seconds"]
    assert 500 < seconds["train"] <= seconds["total"]


def test_a_run_is_not_continued_on_other_records(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = cut.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("apples", "pears", 1))
    assert main(["train", f"train.resume={cut}"]) == 1
    assert "does not give the samples this run began with" in err(capsys)
    assert [row["step"] for row in metrics(cut)] == [1, 2, 3, 4]


def test_records_moved_elsewhere_are_the_same_records(cut: Path) -> None:
    rows = cut.parent / "rows.jsonl"
    config = (cut / "config.yaml").read_text()
    rows.rename(rows.with_name("moved.jsonl"))
    (cut / "config.yaml").write_text(config.replace("rows.jsonl", "moved.jsonl"))
    assert main(["train", f"train.resume={cut}"]) == 0


def test_a_dry_run_of_a_continued_run_shows_that_run(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", f"train.resume={cut}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert '"lora_dropout": 0.1' in out
    assert f"The run would continue from checkpoint-4 in {cut}." in out
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_a_dry_run_of_what_cannot_be_continued_fails_as_the_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"train.resume={tmp_path / 'none'}", "--dry-run"]) == 2
    assert "is not a run directory: it does not exist" in err(capsys)


def test_a_damaged_record_is_left_as_it_is(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cut / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    before = (cut / "result.json").read_bytes()
    assert main(["train", f"train.resume={cut}"]) == 1
    assert "Line 1 of" in err(capsys)
    assert (cut / "result.json").read_bytes() == before


def test_a_run_that_was_begun_by_earlier_rules_is_continued_by_them(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config does not name them; the marks of its checkpoints were not made then either."""
    short = ["train.steps=12", "train.checkpoint_every=7", "optim.warmup=3", "eval.size=0", "eval.before=false"]
    assert main(["train", *settings(workplace, tmp_path / "whole"), *short, "train.rules=1"]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 9, interrupt)
        assert main(["train", *settings(workplace, tmp_path / "cut"), *short, "train.rules=1"]) == 130
    file = tmp_path / "cut" / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "rules:" not in line))
    assert main(["train", f"train.resume={tmp_path / 'cut'}"]) == 0
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "cut"))
    assert [(row["loss"], row["lr"]) for row in parts] == [(row["loss"], row["lr"]) for row in whole]
    assert [row["lr"] for row in whole[:4]] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])
