"""Files of a run that cannot be read are named; what ends without a finite loss is not finished."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.runs.record import RunDirectory
from toys.workplace import make_workplace, read, settings

SHORT = ["eval.size=0", "eval.before=false", "train.steps=4", "train.checkpoint_every=2"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json", "environment.json"])
def test_a_report_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = RunDirectory.create(tmp_path / "run", compose())
    run.update_result(status="finished")
    run.write_environment({})
    run.add_metrics({"step": 1, "loss": 1.0})
    opened = Path.read_text

    def refused(path: Path, *arguments: Any, **more: Any) -> str:
        if path == run.path / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", refused)
    assert main(["report", str(run.path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{run.path / name} c" in said
    assert "be read: Permission denied." in said
    assert "could not be written" not in said
    assert "foreseen" not in said


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def test_a_run_whose_loss_is_not_finite_has_failed(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lorafa.train.measuring.answer_loss", lambda *_, **__: float("nan"))
    run = tmp_path / "run"
    assert main(["train", *settings(workplace, run), *SHORT]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "After the training the held-out loss is nan, so the run has no result." in said
    assert f"What was trained is kept in {run / 'adapter'}. Lower the learning rate" in said
    result = json.loads((run / "result.json").read_text(), parse_constant=pytest.fail)
    assert (result["status"], result["after"]["loss"]) == ("failed", None)
    assert result["error"].startswith("DivergedError: ")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert main(["report", str(run)]) == 0


def test_a_resumed_run_that_was_all_but_done_counts_what_is_trained(workplace: Path, tmp_path: Path) -> None:
    words = [*SHORT, "optim=lora_fa"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *settings(workplace, whole), *words]) == 0
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("lorafa.train.recipe.save", stop)
        assert main(["train", *settings(workplace, cut), *words]) == 130
    assert main(["train", f"train.resume={cut}"]) == 0
    assert read(cut / "result.json")["parameters"] == read(whole / "result.json")["parameters"]


def test_the_best_checkpoint_is_found_from_another_folder(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    keep = ["train.keep_best=true", "optim.lr=1.0", "optim.schedule=constant"]
    words = ["model=model", "data=rows.jsonl", *settings(workplace, Path("r"))[2:], *SHORT, *keep]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafa.train.recipe.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["train", *words]) == 130
    (workplace / "r").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "train.resume=moved"]) == 0
    monkeypatch.chdir(workplace)
    assert main(["train", *words]) == 0
    names = ("kept_step", "after", "parameters")
    results = [read(path / "result.json") for path in (workplace / "r", tmp_path / "moved")]
    assert [results[0][name] for name in names] == [results[1][name] for name in names]
