"""A terminal without a sign that is to be printed ends no command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from lorafa.cli.screen import Screen, writable
from toys.places import ROOT


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "1 ± 2"), ("latin-1", "1 ± 2"), ("ascii", "1 +- 2")])
def test_plus_or_minus_is_written_as_the_terminal_can(encoding: str, shown: str) -> None:
    assert writable("1 ± 2", encoding) == shown


def test_a_report_is_printed_on_a_terminal_of_ascii_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "result.json"):
        source = ROOT / "docs/results/starts/gora/lr-0.004-seed-1" / name
        run.joinpath(name).write_text(source.read_text().replace('"error": null', '"error": "5 \u00b1 \u2713"'))
    code = "import sys; from lorafa.cli.main import main; sys.exit(main(['report', sys.argv[1]]))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 ? ?" in done.stdout


def test_a_terminal_obeys_nothing_that_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("layer\x9b2J")
    table.add_row("model.\x1b[2Jlayer")
    for shown in (table, "model.\x1b[2Jlayer\r", "[bold]a \x1b]0;b\x07[/bold]"):
        Screen().print(shown)
    with Screen().status("\x1b[2J"):
        pass
    out = capsys.readouterr().out
    assert out.count("\u241b[2Jlay") == 2  # the width of a column is of before
    assert not {sign for sign in out if sign < " " or "\x7f" <= sign < "\xa0"} - {"\n"}


def test_colours_and_the_cursor_are_still_rich_s() -> None:
    screen = Screen(force_terminal=True, color_system="standard", legacy_windows=False)
    with screen.capture() as written:
        screen.print("[bold]a[/bold]")
        screen.show_cursor(False)
    assert written.get() == "\x1b[1ma\x1b[0m\n\x1b[?25l"
