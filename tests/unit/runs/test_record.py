"""A run directory: nothing is overwritten, everything is whole, what was recorded stays."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import accelerate
import datasets
import filelock
import hydra
import numpy
import pytest
import safetensors
import tokenizers
import torch
import transformers

from lorafa.conf.compose import compose
from lorafa.errors import CheckpointError, ConfigError
from lorafa.runs import record
from lorafa.runs.environment import environment
from lorafa.runs.record import RunDirectory, TakenError
from lorafa.train.settings.run import RunConfig
from lorafa.version import VERSION


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", compose())


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    config = compose(["peft.rank_pattern={q_proj:4}", "optim.lr=1e-5", "peft.target_modules=[a]", "data=müsli.jsonl"])
    assert RunDirectory.open(RunDirectory.create(tmp_path / "run", config).path).config() == config


def test_a_directory_that_holds_something_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"exists and is not empty; a run overwrites nothing. Choose another run_dir"):
        RunDirectory.place(compose([f"run_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_runs_of_one_second_get_directories_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [RunDirectory.create(RunDirectory.place(compose()), compose()).path for _ in range(3)]
    assert len(set(paths)) == 3
    assert {path.parent.name for path in paths} == {"runs"}


def test_a_claim_is_one_s_own_until_it_ends_and_leaves_nothing_where_nothing_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def look_and_fail(config: RunConfig, given: bool) -> None:
        with RunDirectory.claimed(config) as run:
            assert run.path.is_dir()
            with pytest.raises(TakenError, match=r"is taken: another process is writing to it\. Nothing of it was"):
                run.held().__enter__()
            if given:
                with pytest.raises(TakenError, match="is taken"):
                    RunDirectory.claimed(config).__enter__()
            raise KeyError

    for given in (["run_dir=a/b/c"], []):
        with pytest.raises(KeyError):
            look_and_fail(compose(given), bool(given))
        assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_can_be_given_and_stays(tmp_path: Path) -> None:
    config = compose([f"run_dir={tmp_path}"])
    with pytest.raises(KeyError), RunDirectory.claimed(config):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch()  # of a run that was killed before it wrote anything
    with RunDirectory.claimed(config) as run:
        RunDirectory.create(run.path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]


def test_claims_of_one_second_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 1, 1, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "datetime", Clock)
    with RunDirectory.claimed(compose()) as first, RunDirectory.claimed(compose()) as second:
        names = [first.path.name, second.path.name]
    assert names == [first.path.name, f"{first.path.name}-2"]
    assert first.path.name.startswith("20260101-120000-lora-r")


def test_a_folder_that_another_process_takes_back_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim came to nothing, and it removes the empty runs/ that it had made."""
    path, mkdir = tmp_path / "runs" / "a", Path.mkdir
    removed: list[Path] = []

    def make(folder: Path, *arguments: object, **more: object) -> None:
        if folder == path and not removed:
            removed.append(path.parent)
            path.parent.rmdir()
        mkdir(folder, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", make)
    with RunDirectory.claimed(compose([f"run_dir={path}"])) as run:
        assert run.path.is_dir()
    assert removed


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock here")])
def test_a_place_without_locks_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(ConfigError, match=r"cannot be locked against other processes: .*(No locks|no flock).*\. Put"):
        run.held().__enter__()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    said = r"The run directory '.*' cannot be made: a name in it has 300 bytes, and 255 is the most there\. Choose"
    with pytest.raises(ConfigError, match=said):
        RunDirectory.claimed(compose([f"run_dir={tmp_path / ('n' * 300)}"])).__enter__()


def test_recorded_settings_can_be_read_whichever_version_wrote_them(run: RunDirectory) -> None:
    (run.path / "config.yaml").write_text("peft: {of_another_version: 1}")
    assert run.settings() == {"peft": {"of_another_version": 1}}


def test_the_default_name_says_what_ran() -> None:
    assert RunDirectory.place(compose(["peft=dora", "init=pissa", "peft.r=4"])).name.endswith("-dora-r4-pissa")


@pytest.mark.parametrize(("made", "why"), [(True, "it holds no config.yaml"), (False, "it does not exist")])
def test_what_is_no_run_is_refused(tmp_path: Path, made: bool, why: str) -> None:
    path = tmp_path / "x"
    if made:
        path.mkdir()
    with pytest.raises(ConfigError, match=f"is not a run directory: {why}. Give one that `lorafa train` made"):
        RunDirectory.open(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not yaml"),
        ("", "holds no settings. Restore it, or start a new run"),
        ("peft: {r: many}", "peft.r must be an integer, found 'many'"),
        ("nope: 1", "There is no setting 'nope'"),
    ],
)
def test_damaged_settings_are_refused(run: RunDirectory, text: str, message: str) -> None:
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        run.config()


def test_entries_of_the_result_add_up(run: RunDirectory) -> None:
    run.update_result(status="running", before={"loss": 2.0})
    run.update_result(status="finished", after={"loss": 1.0})
    assert run.result() == {"status": "finished", "before": {"loss": 2.0}, "after": {"loss": 1.0}}


def test_a_result_that_cannot_be_written_leaves_the_old_one(run: RunDirectory) -> None:
    run.update_result(status="running")
    with pytest.raises(TypeError):
        run.update_result(status=object())
    assert run.result() == {"status": "running"}
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "result.json"]


def test_a_line_cut_off_by_a_crash_does_not_hide_the_others(run: RunDirectory) -> None:
    run.add_metrics({"step": 1, "loss": 2.0})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with pytest.warns(UserWarning, match=r"^Line 2 of .*metrics\.jsonl, the last one, is not whole and is left out"):
        assert run.metrics() == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("rest", ['{"step" 2}\n', '{"step": 2\n{"step": 3}\n'])
def test_a_damaged_line_is_reported_with_its_number(run: RunDirectory, rest: str) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n' + rest)
    with pytest.raises(CheckpointError, match=r"Line 2 of .*metrics.jsonl is not json"):
        run.metrics()


def test_a_continued_run_logs_no_step_twice(run: RunDirectory) -> None:
    for step in range(1, 6):
        run.add_metrics({"step": step})
    run.drop_metrics_after(3)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_a_checkpoint_without_its_state_is_not_continued_from(run: RunDirectory) -> None:
    assert run.last_checkpoint() is None
    for step, complete in ((2, True), (10, True), (12, False)):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") if complete else ():
            torch.save({}, folder / name)
        (folder / "trainer_state.json").write_text("{}")
    found = run.last_checkpoint()
    assert found is not None
    assert found.name == "checkpoint-10"


def test_the_environment_is_recorded_in_full(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 37)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"chip {index}")
    run.write_environment(environment(["lorafa", "train", "peft.r=8"]))
    recorded = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    assert run.environment() == recorded
    packages, cpu, cpus = (recorded.pop(name) for name in ("packages", "cpu", "cpus"))
    assert recorded == {
        "lorafa": VERSION,
        "python": ".".join(map(str, sys.version_info[:3])),
        "platform": f"{os.uname().sysname} {os.uname().machine}",
        "threads": 37,
        "processes": 1,
        "accelerators": ["chip 0", "chip 1"],
        "command": ["lorafa", "train", "peft.r=8"],
    }
    for module in (torch, transformers, accelerate, safetensors, tokenizers, datasets, numpy):
        assert packages[module.__name__] == str(module.__version__), module
    assert packages["hydra-core"].startswith(hydra.__version__)
    assert cpu == cpu.strip() != ""
    assert 1 <= cpus <= os.cpu_count()  # type: ignore[operator]


def test_what_lies_in_a_run_or_holds_runs_is_answered_with_the_run(run: RunDirectory) -> None:
    (run.checkpoints / "checkpoint-2").mkdir(parents=True)
    for inside in (run.checkpoints, run.checkpoints / "checkpoint-2"):
        with pytest.raises(ConfigError, match=rf"holds no config\.yaml\. It lies in the run '{run.path}': give that"):
            RunDirectory.open(inside)
    with pytest.raises(ConfigError, match=rf"holds no config\.yaml\. It holds runs: {run.path}\."):
        RunDirectory.open(run.path.parent)
    with pytest.raises(ConfigError, match=r"is not a run directory: it is a file\. It lies in the run"):
        RunDirectory.open(run.path / "config.yaml")


def test_settings_that_are_no_text_are_refused(run: RunDirectory) -> None:
    (run.path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.yaml is not yaml: .*can't decode byte 0xff.* Restore it"):
        run.config()


@pytest.mark.parametrize("line", ["[1]", "null", "3", '{"loss": 1.0}', '{"step": "a"}', '{"step": 1, "loss": null}'])
def test_a_line_that_is_no_metric_is_reported_with_its_number(run: RunDirectory, line: str) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 1, "note": "x"}\n' + line + "\n")
    with pytest.raises(CheckpointError, match=r"Line 2 of .*metrics\.jsonl is not of a training: .* Remove the line"):
        run.metrics()


@pytest.mark.parametrize("entry", ["before", "after", "seconds", "parameters", "samples"])
def test_an_entry_of_the_result_that_cannot_be_one_is_named(run: RunDirectory, entry: str) -> None:
    run.update_result(**{entry: None})
    (run.path / "result.json").write_text(json.dumps({entry: 3}))
    with pytest.raises(
        CheckpointError, match=rf"result\.json: {entry} must be (a list|an object), found 3\. Restore it"
    ):
        run.result()


def test_metrics_of_a_run_that_was_removed_are_a_checkpoint_error(run: RunDirectory) -> None:
    shutil.rmtree(run.path)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl could not be written: No such file or directory\. Make"):
        run.add_metrics({"step": 1})


@pytest.mark.parametrize("settings", [[], ["if_exists=new"]])
def test_a_name_that_another_run_takes_between_the_look_and_the_claim_is_left_to_it(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if settings:
        RunDirectory.create(Path("a"), compose())
    config = compose([*settings, *(["run_dir=a"] if settings else [])])
    free, taken = record._free, []

    def taken_at_once(names: Iterator[Path]) -> Path:
        taken.append(RunDirectory.create(free(names), compose()).path)
        return taken[0]

    monkeypatch.setattr(record, "_free", taken_at_once)
    with RunDirectory.claimed(config) as run:
        assert run.path not in taken
        assert not (run.path / "config.yaml").exists()
