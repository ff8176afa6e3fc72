"""A run whose newest checkpoint is damaged goes on from the one before, and comes to what it would have come to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafa.cli.main import main
from lorafa.train.checkpoints import seal
from toys.workplace import at_step, make_workplace, metrics, read, settings

MORE = ["train.steps=6", "train.checkpoint_every=2", "eval.size=0", "eval.before=false"]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run, and one that was interrupted after step 4, with its checkpoints of steps 2 and 4."""
    workplace = make_workplace(tmp_path_factory.mktemp("work"))
    whole, run = workplace / "whole", workplace / "cut"
    assert main(["train", *settings(workplace, whole), *MORE]) == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5)
        assert main(["train", *settings(workplace, run), *MORE]) == 130
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    return whole, run


def again(cut: tuple[Path, Path], run: Path, damage: Callable[[Path], object]) -> None:
    """Damage the newest checkpoint of a copy, continue it, and compare with the whole run."""
    whole, old = cut
    shutil.copytree(old, run)
    damage(run / "checkpoints" / "checkpoint-4")
    assert main(["train", f"train.resume={run}"]) == 0
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, whole))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole)]
    assert read(run / "result.json")["after"] == read(whole / "result.json")["after"]


def empty(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: os.truncate(checkpoint / name, 0)


def half(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def zeroed(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_bytes(bytes((checkpoint / name).stat().st_size))


DAMAGES = {
    "optimizer.pt empty": empty("optimizer.pt"),
    "scheduler.pt cut": half("scheduler.pt"),
    "rng_state.pth zeroed": zeroed("rng_state.pth"),
    "trainer_state.json zeroed": zeroed("trainer_state.json"),
    "adapter empty": empty("adapter_model.safetensors"),
    "contents cut": half("checkpoint.json"),
}


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if n in (0, 5) else pytest.mark.slow) for n, name in enumerate(DAMAGES)]
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    cut: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    again(cut, tmp_path / "run", DAMAGES[damage])
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: {tmp_path / 'run' / 'checkpoints' / 'checkpoint-4'} is passed over, for it is not whole: " in said
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "damaged-checkpoint-4"]


def test_one_of_an_older_version_is_continued(
    cut: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(cut, tmp_path / "run", lambda checkpoint: (checkpoint / "checkpoint.json").unlink())
    assert "passed over" not in capsys.readouterr().err


def test_a_run_without_a_whole_one_starts_again_or_says_so(
    cut: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, old = cut
    run = shutil.copytree(old, tmp_path / "run")
    for name in ("checkpoint-2", "checkpoint-4"):
        (run / "checkpoints" / name / "optimizer.pt").unlink()
    assert main(["train", f"train.resume={run}"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-2 is passed over, for it is not whole: optimizer.pt missing or damaged." in said
    assert "has no checkpoint to continue from" in said
    assert main(["train", *settings(old.parent, run), *MORE, "if_exists=resume"]) == 0
    assert read(run / "result.json")["after"] == read(whole / "result.json")["after"]


def saved(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


HELD = {
    "nothing": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"PK then nothing"),
    "a list": saved([1]),
    "other keys": saved({"param_groups": 3}),
    "other shapes": saved({"state": {0: {"step": torch.ones(3)}}, "param_groups": [{"params": [0, 1, 2]}]}),
}


@pytest.mark.matrix(7, each_word=False)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_says_it_is_whole_and_holds_something_else_is_refused(
    cut: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, held: str
) -> None:
    run = shutil.copytree(cut[1], tmp_path / "run")
    checkpoint = run / "checkpoints" / "checkpoint-4"
    HELD[held](checkpoint / name)
    seal(checkpoint)
    assert main(["train", f"train.resume={run}"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "not foreseen" not in said
    assert f"{checkpoint} does not hold the state of such a training: " in said
    assert said.endswith("Resume from another checkpoint.")


@pytest.mark.parametrize(
    "held", ["[]", "{}", '{"unknown": 1}', '{"global_step": "two"}', '{"stateful_callbacks": {"LoraCallback": []}}']
)
@pytest.mark.matrix(4, each_word=False)
def test_so_is_one_whose_state_is_another(
    cut: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], held: str
) -> None:
    run = shutil.copytree(cut[1], tmp_path / "run")
    checkpoint = run / "checkpoints" / "checkpoint-4"
    (checkpoint / "trainer_state.json").write_text(held)
    seal(checkpoint)
    assert main(["train", f"train.resume={run}"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "not foreseen" not in said
    assert str(checkpoint) in said
