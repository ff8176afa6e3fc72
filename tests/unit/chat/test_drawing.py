"""Answers in columns where the terminal is wide enough, else one below the other; nothing of them gets lost."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lorafa.chat.drawing import NARROWEST, Drawing, SideBySide, Stacked, drawing

CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
NAMES = ["base", "german", "fr"]


def screen(width: int, *, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, height=12, force_terminal=terminal, color_system=None)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_columns_need_a_terminal_that_is_wide_enough_and_more_than_one_answer() -> None:
    kinds = {
        SideBySide: [drawing(screen(120), NAMES), drawing(screen(2 * NARROWEST + 3), NAMES[:2])],
        Stacked: [
            drawing(screen(2 * NARROWEST + 2), NAMES[:2]),
            drawing(screen(120, terminal=False), NAMES),
            drawing(screen(120), NAMES[:1]),
        ],
    }
    for kind, found in kinds.items():
        assert {type(one) for one in found} == {kind}


def test_one_below_the_other_the_first_comes_as_it_is_written_and_the_others_whole() -> None:
    console = screen(40)
    with Stacked(console, NAMES) as shown:
        shown.add(1, "ei")
        shown.add(0, "eg")
        assert output(console) == "--- base\neg"
        shown.add(0, "g")
        shown.end(1)
        shown.end(0)
        assert output(console) == "--- base\negg\n\n--- german\nei\n\n--- fr\n"
        shown.add(2, "œuf [bold]")
        shown.end(2)
    assert output(console).endswith("--- fr\nœuf [bold]\n\n")


def test_alone_it_has_no_heading() -> None:
    console = screen(40, terminal=False)
    with Stacked(console, NAMES[:1]) as shown:
        shown.add(0, "a" * 100)
        shown.end(0)
    assert output(console) == "a" * 100 + "\n"


def test_side_by_side_the_whole_answers_stand_in_columns_at_the_end() -> None:
    console, words = screen(100), [f"w{n:03}" for n in range(150)]
    with SideBySide(console, NAMES) as shown:
        for word in words:
            for place in range(3):
                shown.add(place, f"{word}.{place} ")
        shown.add(0, "\n[red]end")
    text = CODES.sub("", output(console))
    for place in range(3):
        assert [f"{word}.{place}" for word in words] == list(
            dict.fromkeys(re.findall(rf"w\d{{3}}\.{place}", text[text.index("w000.0") :]))
        )
    assert "[red]end" in text
    last = next(line for line in text.splitlines() if "w000.0" in line)
    assert [last.index(f"w000.{place}") for place in range(3)] == [0, 34, 68]


def test_while_it_is_written_no_more_is_shown_than_the_screen_has_lines() -> None:
    console = screen(100)
    shown = SideBySide(console, NAMES[:2])
    shown.add(0, "\n".join(f"line {n}" for n in range(50)))
    with console.capture() as seen:
        console.print(shown._ends())
    lines = [line.strip() for line in CODES.sub("", seen.get()).splitlines()]
    assert len(lines) <= 12
    assert lines[-1] == "line 49"


@pytest.mark.parametrize("kind", [Stacked, SideBySide])
def test_nothing_that_a_terminal_obeys_comes_from_a_model_or_a_name(kind: type[Drawing]) -> None:
    console = screen(100)
    with kind(console, ["a\x1b[2J", "b\x07"]) as shown:
        for place in range(2):
            shown.add(place, "x\x1b]52;c;cm0=\x07\x9b2Jy\r\b")
            shown.end(place)
    obeyed = CODES.sub("", output(console))  # rich's own are all of this form
    assert "\x1b[2J" not in output(console)
    assert not set(obeyed) & {"\x1b", "\x07", "\x9b", "\b"}
    assert obeyed.replace("\r", "").count("x\u241b]52;c;cm0=\u2407\ufffd2Jy\u2408") >= 2
