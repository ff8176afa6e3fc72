"""A pipeline whose reader has gone ends a command quietly, with the status of other tools; and narrow terminals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli import main as cli
from lorafa.cli.main import main
from toys.places import ROOT
from toys.processes import STARTS
from toys.workplace import make_workplace, read, settings

SOURCES = str(ROOT / "src")
CLOSED = 141
"""128 + SIGPIPE, what a shell says of `yes` in `yes | true`."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def run(workplace: Path) -> Path:
    """A run that is over."""
    path = workplace / "run"
    assert main(["train", *settings(workplace, path), "train.steps=2", "eval.size=0", "eval.before=false"]) == 0
    return path


def unread(*arguments: str, both: bool = False, **environment: str) -> tuple[int, list[str]]:
    """Exit status and complaints of a command whose output is a pipe without a reader; ``both``: the errors as well."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorafa.cli.main", *arguments],
            stdout=writer,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **environment},
        )
    finally:
        os.close(writer)
    return done.returncode, complaints(done.stderr or "")


def complaints(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if re.search("Traceback|Broken|Error|ignored", line)]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "--version", "train --help"])
def test_help_that_nobody_reads_ends_quietly(command: str, unbuffered: str) -> None:
    assert unread(*command.split(), PYTHONUNBUFFERED=unbuffered) == (CLOSED, [])


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_what_the_doctor_says_to_nobody_ends_quietly(form: list[str]) -> None:
    assert unread("doctor", "--quick", *form) == (CLOSED, [])
    assert unread("doctor", "--quick", *form, both=True, PYTHONUNBUFFERED="1") == (CLOSED, [])


def test_a_report_that_nobody_reads_ends_quietly(run: Path) -> None:
    assert unread("report", str(run), PYTHONUNBUFFERED="1") == (CLOSED, [])
    assert unread("report", str(run), str(run), "--page", str(run / "all.html"), PYTHONUNBUFFERED="1") == (CLOSED, [])


def test_errors_that_nobody_reads_end_quietly(tmp_path: Path) -> None:
    assert unread("report", str(tmp_path / "none"), both=True) == (CLOSED, [])
    assert unread("report", both=True) == (CLOSED, [])


def command(output: Any, errors: Path, arguments: tuple[str, ...]) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(output.fileno(), 1)
    output.close()
    sys.exit(main(list(arguments)))


def read_to(lines: int, errors: Path, *arguments: str) -> tuple[int | None, list[str], list[str]]:
    """Exit status, output and complaints of a command whose reader goes after so many lines.

    The command needs the classes of models, which its process has loaded before; how the interpreter ends is left to
    the commands above.
    """
    reader, writer = STARTS.Pipe(duplex=False)
    if not lines:
        reader.close()
    process = STARTS.Process(target=command, args=(writer, errors, arguments))
    process.start()
    writer.close()
    read = []
    if lines:
        with os.fdopen(os.dup(reader.fileno())) as file:
            reader.close()
            read = [file.readline() for _ in range(lines)]
    process.join(120)
    return process.exitcode, read, complaints(errors.read_text())


@pytest.mark.parametrize("command", ["params model=opt-125m", "params model=opt-125m --json"])
def test_tables_that_nobody_reads_end_quietly(command: str, tmp_path: Path) -> None:
    assert read_to(0, tmp_path / "errors", *command.split()) == (CLOSED, [], [])


def test_the_first_line_of_a_table_is_there_for_who_wants_no_more(tmp_path: Path) -> None:
    status, read, complaints = read_to(1, tmp_path / "errors", "params", "model=opt-125m")
    assert [line.strip() for line in read] == ["What is added"]
    assert status in (0, CLOSED)  # 0: all was written before the reader had gone
    assert complaints == []


def test_a_training_that_nobody_reads_ends_quietly(workplace: Path, tmp_path: Path) -> None:
    short = ["train.steps=2", "eval.size=0", "eval.before=false"]
    train = ("train", *settings(workplace, tmp_path / "run"), *short, "--traceback")
    assert read_to(0, tmp_path / "errors", *train) == (CLOSED, [], [])
    assert not (tmp_path / "run").exists()  # what it adapts is said before anything is written


def test_a_reader_that_goes_on_the_way_is_recorded(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafa.cli.pipes import OutputClosed
    from lorafa.train import recipe

    def on_log(*_: object, **__: object) -> None:
        raise OutputClosed

    monkeypatch.setattr(recipe.RunCallback, "on_log", on_log)
    with pytest.raises(SystemExit) as stop:
        main(["train", *settings(workplace, tmp_path / "run"), "eval.size=0", "eval.before=false"])
    assert stop.value.code == CLOSED
    result = read(tmp_path / "run" / "result.json")
    assert (result["status"], result["error"]) == ("failed", "OutputClosed: nobody reads the output any more")


def test_a_connection_that_breaks_is_no_closed_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.report, "run", run)
    assert main(["report", "x"]) == 1
    assert "BrokenPipeError: [Errno 32] Broken pipe. This was not foreseen" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["20", "1"])
@pytest.mark.parametrize("command", ["--help", "train --help", "params --help", "params model=opt-125m"])
def test_a_narrow_terminal_gets_narrow_output(
    command: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    try:
        status = main(command.split())
    except SystemExit as stop:
        status = int(str(stop.code or 0))
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert re.search(r"\w", out)


@pytest.mark.parametrize("columns", ["20", "1"])
def test_a_narrow_terminal_shows_a_run(
    workplace: Path, run: Path, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["train", *settings(workplace, workplace / "none"), "--dry-run"]) == 0
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().err == ""
