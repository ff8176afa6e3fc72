"""A run directory that is there already, and runs that go on for longer than they began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafa.cli.main import main
from toys.workplace import at_step, make_workplace, metrics, read, settings

SHORT = ["eval.size=0", "optim.schedule=constant"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def err(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def train(workplace: Path, run: Path, *more: str) -> int:
    return main(["train", *settings(workplace, run), *SHORT, *more])


def assert_same_training(one: Path, other: Path) -> None:
    assert [row["step"] for row in metrics(one)] == [row["step"] for row in metrics(other)]
    assert [row["loss"] for row in metrics(one)] == [row["loss"] for row in metrics(other)]
    assert read(one / "result.json")["after"] == read(other / "result.json")["after"]
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.matrix(2, each_word=False)
@pytest.mark.parametrize("at", [2, 6])  # before and after the first checkpoint
def test_a_run_is_started_again_with_the_same_command(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(workplace, whole, "if_exists=resume") == 0
    with monkeypatch.context() as patch:
        at_step(patch, at)
        assert train(workplace, cut, "if_exists=resume") == 130
    assert train(workplace, cut, "if_exists=resume", "--dry-run") == 0
    assert f"The run would go on in {cut}." in capsys.readouterr().out
    assert train(workplace, cut, "if_exists=resume") == 0
    assert_same_training(cut, whole)
    before = {path: path.read_bytes() for path in cut.rglob("*.json*")}
    assert train(workplace, cut, "if_exists=resume") == 0
    assert f"The run {cut} is finished." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in cut.rglob("*.json*")} == before
    assert train(workplace, cut, "if_exists=resume", "peft.r=8") == 2
    assert "has other settings, so it is not resumed: peft.r was 4 then and is 8 now. Give" in err(capsys)


def test_a_run_takes_the_next_free_name(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert train(workplace, tmp_path / "run", "if_exists=new", "train.steps=1", "eval.before=false") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2", "run-3"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert train(workplace, tmp_path / "mine", "if_exists=resume") == 2
    assert "exists and is not empty; a run overwrites nothing" in err(capsys)


@pytest.mark.matrix(2, each_word=False)
@pytest.mark.parametrize("length", ["train.steps=12", "train.epochs=3"])  # an epoch has four steps
@pytest.mark.parametrize("warmup", ["optim.warmup=0.2", "optim.warmup=0"])
def test_a_finished_run_goes_on_as_one_that_was_longer_from_the_start(
    workplace: Path, tmp_path: Path, length: str, warmup: str
) -> None:
    short, whole = tmp_path / "short", tmp_path / "whole"
    steps = "optim.warmup=2" if warmup.endswith("2") else warmup  # a fifth of seven steps, rounded up
    assert train(workplace, whole, steps) == 0
    assert train(workplace, short, "train.steps=7", "train.checkpoint_every=7", warmup) == 0
    assert main(["train", f"train.resume={short}", length]) == 0
    assert_same_training(short, whole)
    assert read(short / "result.json")["steps"] == 12


def test_what_cannot_go_on_is_refused(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, linear = tmp_path / "run", tmp_path / "linear"
    assert train(workplace, run, "train.steps=4") == 0
    assert train(workplace, linear, "train.steps=4", "optim.schedule=linear") == 0
    assert main(["train", f"train.resume={run}"]) == 2
    assert "is finished; there is nothing to continue. Give it more steps beside train.resume, train.steps=8" in err(
        capsys
    )
    assert main(["train", f"train.resume={run}", "train.steps=4"]) == 2
    assert "has a checkpoint of step 4 already, found train.steps=4. Give more steps" in err(capsys)
    assert main(["train", f"train.resume={run}", "train.epochs=1"]) == 2
    assert "has gone over its rows 1 times already, found train.epochs=1" in err(capsys)
    assert main(["train", f"train.resume={run}", "train.steps=8", "peft.r=2"]) == 2
    assert "A continued run keeps its settings, found 'peft.r=2' beside train.resume" in err(capsys)
    assert main(["train", f"train.resume={linear}", "train.steps=8"]) == 2
    text = err(capsys)
    assert "With optim.schedule=linear the rates of a longer training are others from its first step on" in text
    assert f"Start a new run from its adapter: peft.adapter={linear / 'adapter'}." in text


def test_a_run_that_was_stopped_goes_on_with_more_patience(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stops = ["train.steps=20", "train.keep_best=true", "train.checkpoint_every=1", "train.patience=1", "optim.lr=30"]
    assert train(workplace, run, *stops, "optim.warmup=0", "train.keep_checkpoints=20") == 0
    steps = read(run / "result.json")["steps"]
    assert steps < 20
    assert main(["train", f"train.resume={run}", "train.steps=22"]) == 2
    assert "stops for train.patience=1: the held-out loss has not fallen" in err(capsys)
    assert main(["train", f"train.resume={run}", "train.steps=22", "train.patience=null"]) == 0
    result = read(run / "result.json")
    assert (result["steps"], result["stopped"]) == (22, None)
