"""Runs with few held-out rows, with none, and with those of another file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import DataError
from lorafa.runs.experiment import start_run
from toys.workplace import ROWS, make_workplace, metrics, read, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def short(workplace: Path, run: Path, *more: str) -> list[str]:
    own = [text for text in settings(workplace, run) if not text.startswith(("data.eval_size", "train.steps"))]
    return ["train", *own, "train.steps=3", *more]


def test_without_held_out_rows_a_run_trains_and_says_that_nothing_is_measured(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(short(workplace, run, "data.eval_size=0")) == 0
    assert "No rows are held out: nothing is measured before and after." in " ".join(capsys.readouterr().out.split())
    result = read(run / "result.json")
    assert (result["status"], result["rows"]["train"], result["rows"]["heldout"]) == ("finished", 20, 0)
    assert "loss" not in result["before"] | result["after"]
    assert len(metrics(run)) == 3
    assert (run / "report.html").is_file()
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize(
    "setting", ["train.eval_every=1", "train.keep_best=true", "optim.schedule=reduce_lr_on_plateau train.eval_every=1"]
)
def test_what_goes_by_held_out_rows_is_refused_without(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert main(short(workplace, tmp_path / "run", "data.eval_size=0", *setting.split())) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "goes by held-out rows, and none of" in text
    assert not (tmp_path / "run").exists()


def test_a_run_for_a_comparison_is_refused_other_samples_before_it_trains(workplace: Path, tmp_path: Path) -> None:
    overrides = short(workplace, tmp_path / "first")[1:]
    console = Console(quiet=True)
    digest = read(start_run(compose(overrides), console, []) / "result.json")["samples_sha256"]
    other = compose([*overrides, f"run_dir={tmp_path / 'other'}", "data.train_size=5"])
    with pytest.raises(
        DataError,
        match=rf"rows\.jsonl gives other samples than the runs this one is to be compared with saw \(samples_sha256 "
        rf"\w{{12}} and {digest[:12]}\): .* Restore them, or compare in another folder\. Nothing was trained",
    ):
        start_run(other, console, [], samples=digest)
    assert not (tmp_path / "other").exists()
    same = compose([*overrides, f"run_dir={tmp_path / 'same'}", "optim.lr=0.1"])
    assert read(start_run(same, console, [], samples=digest) / "result.json")["status"] == "finished"


def test_rows_of_another_file_are_measured(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    run = tmp_path / "run"
    assert main(short(workplace, run, f"data.eval_file={tmp_path / 'test.jsonl'}")) == 0
    result = read(run / "result.json")
    assert result["rows"] == {"train": 17, "heldout": 3, "repeated": 3, "dropped": 0, "truncated": 0}
    assert result["after"]["total"] == 3
    assert "3 samples answer a question of a held-out row and were left out." in capsys.readouterr().out


def test_a_share_is_held_out_and_a_comparison_needs_some(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(short(workplace, tmp_path / "run", "data.eval_size=0.25", "eval.size=0", "eval.before=false")) == 0
    assert read(tmp_path / "run" / "result.json")["rows"]["heldout"] == 5
    (tmp_path / "plan.yaml").write_text(
        "{baseline: a, seeds: [0], settings: [data.eval_size=0], methods: {a: {settings: [], rates: [1.0e-3]}}}"
    )
    assert main(["compare", str(tmp_path / "plan.yaml"), str(tmp_path / "out")]) == 2
    assert "runs are compared by held-out loss, and data.eval_size of a is 0" in " ".join(
        capsys.readouterr().err.split()
    )
