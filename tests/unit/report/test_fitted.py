"""Tables that cut no word, on any screen and in a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lorafa.cli.main import main
from lorafa.report.fitted import Facts, Fitted, shared
from toys.runs import make_run

HEADINGS = ("method", "held-out loss", "accuracy, difference")
ROWS = [("lora/lr-0.0012345678", "0.6914 ± 0.0031", "-"), ("another method of many words", "1.0 ± 0.1", "+0.0123")]
WORDS = {word for row in (HEADINGS, *ROWS) for text in row for word in text.split()}


def printed(shown: object, width: int | None, terminal: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    console.print(shown, crop=False)
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 71, 60, 40, 25])
def test_no_word_is_cut_where_the_screen_is_as_wide_as_the_longest(width: int) -> None:
    text = printed(Fitted(HEADINGS, ROWS, "A title of several words"), width)
    assert max(map(len, text.splitlines())) <= width
    found = {*text.replace("│", " ").replace("┃", " ").split()}
    assert {word for word in WORDS if not {word, f"{word}:"} & found} == set()


@pytest.mark.parametrize("width", [1, 5, 10])
def test_a_screen_narrower_than_a_word_gets_all_letters(width: int) -> None:
    text = printed(Fitted(HEADINGS, ROWS), width)
    assert max(map(len, text.splitlines())) <= width
    assert "".join(ROWS[0][0].split()) in re.sub(r"\s", "", text)


def test_a_pipe_gets_a_table_as_wide_as_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [tuple(f"{cell} {'x' * 60}" for cell in row) for row in ROWS]
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = printed(Fitted(HEADINGS, rows), None, terminal=False).splitlines()
    assert len(lines) == 6  # a frame, the headings and the rows: nothing goes on in a second line
    for row in rows:
        assert any(all(cell in line for cell in row) for line in lines)
    long = "an error of many words " * 10
    assert printed(Facts([("error", long)]), None, terminal=False).count("\n") == 1
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, printed(Fitted(HEADINGS, ROWS), None, terminal=False).splitlines())) <= 40


def test_the_room_that_is_left_goes_to_the_narrowest() -> None:
    assert shared([2, 3, 10], [10, 4, 30], 15) == [2, 3, 10]
    assert shared([2, 3, 10], [10, 4, 30], 19) == [5, 4, 10]
    assert shared([2, 3, 10], [10, 4, 30], 100) == [10, 4, 30]


def test_brackets_are_no_markup() -> None:
    assert "[/x]" in printed(Fitted(("a[b]", "c"), [("[/x]", "[red]")]), 80)
    assert "[/x]" in printed(Facts([("error", "[/x]")]), 80)


@pytest.mark.parametrize("columns", ["80", "40", None])
def test_reports_of_several_runs_cut_no_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    for seed in range(2):
        for rate in (1e-3, 2e-3):
            make_run(tmp_path / f"{rate}-{seed}", loss=1 + rate * seed, rate=rate, seed=seed)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out.replace("│", " ").replace("┃", " ").split()
    for word in ("held-out", "difference", "memory", "(baseline)", "dropped", "optim.lr=0.002"):
        assert word in text or f"{word}:" in text, word
