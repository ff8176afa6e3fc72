"""`report_to=`: trainings that are reported beside their own record, without a network."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.train.trackers import entry, names_in
from toys.workplace import at_step, make_workplace, metrics, read, settings

SHORT = ["eval.size=0", "eval.before=false", "optim.schedule=constant"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def train(workplace: Path, run: Path, *more: str) -> int:
    return main(["train", *settings(workplace, run), *SHORT, *more])


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_shows_what_the_record_has_once_where_a_run_is_continued(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 6)
        assert train(workplace, run, "report_to=tensorboard") == 130
    assert main(["train", f"train.resume={run}"]) == 0
    shown = scalars(run / "tensorboard", "train/loss")
    assert shown == {row["step"]: pytest.approx(row["loss"], abs=1e-4) for row in metrics(run)}


def test_wandb_works_offline_and_goes_on_as_the_same_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    assert train(workplace, run, "report_to=[wandb,tensorboard]", "train.steps=4", "train.checkpoint_every=0") == 0
    import wandb

    assert wandb.run is None  # the next run in this process is another one
    identity = read(run / "result.json")["reported_as"]
    assert [path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")] == [identity]
    assert scalars(run / "tensorboard", "train/loss").keys() == {1, 2, 3, 4}
    assert "WANDB_RUN_ID" not in os.environ
    record = "".join(path.read_text() for path in run.iterdir() if path.is_file())
    assert "0123456789" * 4 not in record


def test_what_is_not_installed_says_the_line_that_installs_it(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spec(name: str, *_: Any) -> Any:
        return None if name in ("trackio", "mlflow") else find_spec(name)

    monkeypatch.setattr(entry, "find_spec", spec)
    assert train(workplace, tmp_path / "run", "report_to=[mlflow,tensorboard,trackio]") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "report_to: mlflow and trackio cannot be reported to, the package is not installed." in said
    assert "Run: pip install mlflow trackio; or leave it out." in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("wandbb", "report_to has no value .wandbb.. Did you mean .wandb."),
        ("[none,wandb]", "report_to=none,wandb contradicts itself. Name each once, or none alone."),
        ("[wandb,wandb]", "report_to=wandb,wandb contradicts itself"),
    ],
)
def test_names_that_are_none(value: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose([f"report_to={value}"])
    assert names_in(compose(["report_to=none"]).report_to) == names_in(compose(["report_to=[]"]).report_to) == []
