"""The frame of the command line: help, exit status, errors without a traceback."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli import main as cli
from lorafa.cli import train
from lorafa.conf.compose import KEYS, compose
from lorafa.errors import ConfigError, DataError, NotAvailableError, TargetError
from lorafa.version import VERSION


def run(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `lorafa train` end in the given error."""

    def install(error: BaseException) -> None:
        def raise_it(*_: Any) -> int:
            raise error

        monkeypatch.setattr(train, "run", raise_it)

    return install


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("wrong setting"), 2),
        (TargetError("no such layer"), 2),
        (NotAvailableError("of a later version"), 2),
        (DataError("no rows"), 1),
        (OSError("disk"), 1),
        (ZeroDivisionError("oops"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_status_tells_what_went_wrong(
    failing: Callable[[BaseException], None], error: BaseException, status: int
) -> None:
    failing(error)
    assert run(["train"]) == status


def test_an_error_is_one_line_on_stderr_without_a_traceback(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(DataError("a long text " * 30 + "\nwith [markup] in it"))
    run(["train"])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: " + "a long text " * 30 + "with [markup] in it\n"


@pytest.mark.parametrize("kind", [DataError, OSError])
@pytest.mark.parametrize("option", [[], ["--traceback"]])
def test_a_terminal_obeys_nothing_that_an_error_quotes(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    kind: type[Exception],
    option: list[str],
) -> None:
    failing(kind("\x1b[2J\x1b]0;mine \x9b31mred"))
    run(["train", *option])
    err = capsys.readouterr().err
    assert "\u241b[2J\u241b]0;mine \ufffd31mred" in err
    assert not {sign for sign in err if sign < " " or "\x7f" <= sign < "\xa0"} - {"\n"}


def test_an_unforeseen_error_names_its_kind_and_the_switch(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(ZeroDivisionError("oops"))
    run(["train"])
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: oops. This was not foreseen; --traceback")


def test_the_traceback_comes_when_asked_for(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(DataError("no rows"))
    assert run(["train", "--traceback"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: no rows\n")


def test_help_of_train_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in KEYS if f"\n  {name}=" not in text] == []
    assert f"\n  peft.r={compose().peft.r}\n" in text
    assert "peft=dora|full_ft|lora|qv|rslora" in text
    assert "Rank: inner dimension of B @ A." in text


@pytest.mark.parametrize("command", ["train", "report"])
def test_help_has_examples_and_the_exit_status(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"examples:\n  lorafa {command}" in text
    assert "exit status: 0 done, 1" in text


def test_the_help_of_eval_says_which_evaluations_are_no_task(capsys: pytest.CaptureFixture[str]) -> None:
    from lorafa.evals import EVALS

    with pytest.raises(SystemExit):
        cli.parse(["eval", "--help"])
    of_runs = [name for name in EVALS.names() if EVALS.get(name).read is None]
    assert f"\n({', '.join(of_runs)}: in a training alone)\n" in capsys.readouterr().out


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    there = ("train", "report", "plan", "chat", "combine", "merge", "export", "inspect", "doctor")
    assert [word for word in there if f"    {word} " not in text] == []


@pytest.mark.parametrize("arguments", [[], ["nope"], ["train", "--nope"], ["report"], ["report", "a", "b"]])
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    assert run(arguments) == 2


def test_settings_may_stand_around_options() -> None:
    args = cli.parse(["train", "peft.r=4", "--dry-run", "optim.lr=1"])
    assert args.dry_run
    assert args.overrides == ["peft.r=4", "optim.lr=1"]


def test_command_is_recorded_as_it_was_given_also_by_a_script_that_calls_main() -> None:
    assert cli.parse(["train", "--dry-run", "peft.r=4"]).command == ["lorafa", "train", "--dry-run", "peft.r=4"]


def test_a_wrong_setting_of_the_adapter_leaves_no_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "peft.r=0"]) == 2
    assert "r must be an integer >= 1, found 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_continued_run_takes_no_other_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "train.resume=runs/x", "peft.r=4"]) == 2
    assert "A continued run keeps its settings, found 'peft.r=4' beside train.resume." in capsys.readouterr().err


def test_continuing_what_is_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", f"train.resume={tmp_path / 'none'}"]) == 2
    assert "is not a run directory: it does not exist" in " ".join(capsys.readouterr().err.split())


def test_the_package_runs_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafa", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lorafa", run_name="__main__")
    assert ended.value.code in (0, None)
    assert VERSION in capsys.readouterr().out
