"""Nothing that a terminal obeys is left in what is shown of a model's text."""

from __future__ import annotations

import unicodedata

import pytest

from lorafa.chat.printable import printable

EVERY = "".join(map(chr, range(0x3000)))


def test_no_control_character_is_left_but_tabs_and_line_ends() -> None:
    left = {sign for sign in printable(EVERY) if unicodedata.category(sign) == "Cc"}
    assert left == {"\n", "\t"}


def test_no_mark_that_turns_the_direction_of_writing_is_left() -> None:
    turning = {sign for sign in EVERY if unicodedata.bidirectional(sign) in {
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}}  # fmt: skip
    assert len(turning) == 9
    assert not turning & set(printable(EVERY))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]52;c;cm0=\x07", "\u241b[2J\u241b]52;c;cm0=\u2407"),
        ("\x9b31mred", "\ufffd31mred"),
        ("one\r\ntwo\tthree", "one\ntwo\tthree"),
        ("naïve 日本 🙂 ‍👩‍👧", "naïve 日本 🙂 ‍👩‍👧"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown
