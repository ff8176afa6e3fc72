"""`lorafa train -m` on a small model: with Hydra's launchers, cut short and started again, by two processes at once."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lorafa.cli.main import main
from lorafa.runs import sweep
from toys.processes import STARTS
from toys.workplace import make_workplace, metrics, read, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("sweeps"))


def words(workplace: Path, folder: Path, *more: str) -> list[str]:
    own = [word for word in settings(workplace, folder) if not word.startswith(("train.steps", "train.checkpoint"))]
    return ["train", "-m", *own, "eval=loss", "train.steps=2", "threads=1", *more]


def own_loss(words: list[str]) -> list[str]:
    """Without settings of the evaluation that answers questions."""
    return [word for word in words if not word.startswith("eval.max_new_tokens")]


def states(folder: Path) -> dict[str, str]:
    return {row["name"]: row["status"] for row in read(folder / "sweep.json")["points"]}


def test_one_after_another_with_a_table_a_failure_and_status_1(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    command = own_loss(words(workplace, folder, "init=default,pissa", "peft.r=2,64"))
    assert main(command) == 1
    assert states(folder) == {
        "init=default,peft.r=2": "finished",
        "init=default,peft.r=64": "finished",
        "init=pissa,peft.r=2": "finished",
        "init=pissa,peft.r=64": "failed",
    }
    shown = capsys.readouterr().out
    assert "init=pissa,peft.r=64: ConfigError: " in shown
    assert "has no 64 singular vectors" in shown.replace("\n", " ")
    assert main([*command, "--dry-run"]) == 0
    assert "Dry run: nothing was trained, nothing was written. 4 runs in" in capsys.readouterr().out.replace("\n", " ")


def test_a_single_point_is_an_ordinary_run(workplace: Path, tmp_path: Path) -> None:
    assert main(own_loss(words(workplace, tmp_path / "one"))) == 0
    assert (tmp_path / "one" / "adapter").is_dir()
    assert not (tmp_path / "one" / "sweep.json").exists()


LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra.launcher.n_jobs=2"],
    "ray": ["++hydra.launcher.ray.init.num_cpus=2"],  # a cluster of two workers on this machine
}
WITH_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="hydra-ray-launcher is not installed")


def test_one_value_given_twice_or_chosen_from_one_is_an_ordinary_run(workplace: Path, tmp_path: Path) -> None:
    assert main(own_loss(words(workplace, tmp_path / "one", "optim.lr=1e-3,0.001", "train.seed=choice(3)"))) == 0
    assert read(tmp_path / "one" / "result.json")["status"] == "finished"


def test_several_folders_of_one_sweep_are_refused(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = own_loss(words(workplace, tmp_path / "a", f"run_dir={tmp_path / 'a'},{tmp_path / 'b'}"))
    assert main(command) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert f"would lie in several places, {tmp_path / 'a'}, {tmp_path / 'b'}, and a sweep has one folder" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("launcher", ["basic", "joblib", pytest.param("ray", marks=WITH_RAY)])
def test_a_point_is_the_run_that_its_settings_give_whatever_launches_it(
    workplace: Path, tmp_path: Path, launcher: str
) -> None:
    more = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    folder = tmp_path / "s"
    assert main(own_loss(words(workplace, folder, "train.seed=range(2)", *more))) == 0
    assert set(states(folder).values()) == {"finished"}
    alone = own_loss(words(workplace, tmp_path / "alone", "train.seed=1"))
    assert main([word for word in alone if word != "-m"]) == 0
    losses = [[row["loss"] for row in metrics(run)] for run in (folder / "train.seed=1", tmp_path / "alone")]
    assert losses[0] == losses[1]


def started(command: list[str]) -> Any:
    process = STARTS.Process(target=run_command, args=(command,))
    process.start()
    return process


def run_command(command: list[str]) -> None:
    torch.set_num_threads(1)
    sweep.WAIT = 0.2
    sys.exit(main(command))


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_from_the_checkpoint_of_the_run_it_was_at(
    workplace: Path, tmp_path: Path
) -> None:
    """The run ends with the losses of one that nobody has killed."""
    more = ["train.steps=20", "train.checkpoint_every=4"]
    command = own_loss(words(workplace, tmp_path / "s", *more, "train.seed=0,1"))
    first = tmp_path / "s" / "train.seed=0"
    process = started(command)
    try:
        until = time.monotonic() + 60
        while not any(first.glob("checkpoints/checkpoint-*/trainer_state.json")) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    assert read(first / "result.json")["status"] == "running"
    assert main(command) == 0
    assert set(states(tmp_path / "s").values()) == {"finished"}
    assert main(own_loss(words(workplace, tmp_path / "whole", *more, "train.seed=0"))) == 0
    kept = [[(row["step"], row["loss"]) for row in metrics(run)] for run in (first, tmp_path / "whole")]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_two_processes_share_the_points_of_a_sweep(workplace: Path, tmp_path: Path) -> None:
    command = own_loss(words(workplace, tmp_path / "s", "train.seed=range(3)", "train.steps=12"))
    both = [started(command) for _ in range(2)]
    for process in both:
        process.join(timeout=240)
    assert [process.exitcode for process in both] == [0, 0]
    assert set(states(tmp_path / "s").values()) == {"finished"}
    for seed in range(3):
        rows = metrics(tmp_path / "s" / f"train.seed={seed}")
        assert [row["step"] for row in rows] == list(range(1, 13))  # by one process alone
    with FileLock(tmp_path / "s" / ".locks" / "train.seed=0.lock", blocking=False):
        pass  # nobody holds it any more
