"""Texts of models and files for a terminal, which obeys control characters."""

from __future__ import annotations

_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_TURNING = dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
_SHOWN = _PICTURES | _TURNING | {0x0A: 0x0A, 0x09: 0x09, 0x0D: None, 0x2028: 0x0A, 0x2029: 0x0A}


def printable(text: str) -> str:
    """The text with a picture in the place of each control character but tabs and line ends, so that no sequence that
    moves the cursor, sets colours, titles or the clipboard is left. Marks that turn the direction of writing, with
    which a text can look like another, and carriage returns are left out.
    """
    return text.translate(_SHOWN)
