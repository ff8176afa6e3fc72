"""How methods are told apart in drawings: a colour, a mark and a dash each, different for any number of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#a3792f")
"""The first seven are told apart by people who see few colours (Okabe and Ito's, with grey for black and without its
yellow, which white paper hides); all are seen on light and on dark."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))


@dataclass(frozen=True)
class Style:
    """How one method looks."""

    colour: str
    mark: str
    """A marker of matplotlib."""
    dash: tuple[float, ...]
    """Lengths of ink and gap in turn; empty for a line without gaps."""


def style_of(number: int) -> Style:
    """The style of the method with this number, from 0; no two numbers have the same one.

    Neighbours differ in all but the dash, which changes after every eight.
    """
    round_, place = divmod(number, len(COLOURS))
    mark = MARKS[(place + round_) % len(MARKS)]
    turn = round_ + round_ // len(MARKS)  # after 64 all pairs of colour and mark were there, and the dash goes one on
    longer, dash = divmod(turn, len(_DASHES))
    return Style(COLOURS[place], mark, (*_DASHES[dash], *(1.0, 1.0) * longer))


def swatch(style: Style) -> str:
    """A short line with the mark on it, as SVG, to stand before a method's name."""
    dash = f' stroke-dasharray="{" ".join(f"{length:g}" for length in style.dash)}"' if style.dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 32 12" aria-hidden="true">'
        f'<path d="M1 6H31" stroke="{style.colour}" stroke-width="2"{dash} fill="none"/>'
        f'<path d="{_outline(style.mark)}" fill="{style.colour}"/></svg>'
    )


def _outline(mark: str) -> str:
    """The mark around (16, 6), 9 units wide."""
    x, y, r = 16.0, 6.0, 4.5
    if mark == "o":
        return f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    corners = _CORNERS[mark]
    return "M" + "L".join(f"{x + r * a:.2f} {y + r * b:.2f}" for a, b in corners) + "z"


_THIRD, _TILT = 0.35, 0.7
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "s": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "D": [(0, -1.1), (1.1, 0), (0, 1.1), (-1.1, 0)],
    "^": [(0, -1), (1, 0.9), (-1, 0.9)],
    "v": [(0, 1), (1, -0.9), (-1, -0.9)],
    "P": [
        *((-_THIRD, -1), (_THIRD, -1), (_THIRD, -_THIRD), (1, -_THIRD), (1, _THIRD), (_THIRD, _THIRD)),
        *((_THIRD, 1), (-_THIRD, 1), (-_THIRD, _THIRD), (-1, _THIRD), (-1, -_THIRD), (-_THIRD, -_THIRD)),
    ],
    "X": [
        *((-_TILT, -1), (0, -_THIRD), (_TILT, -1), (1, -_TILT), (_THIRD, 0), (1, _TILT)),
        *((_TILT, 1), (0, _THIRD), (-_TILT, 1), (-1, _TILT), (-_THIRD, 0), (-1, -_TILT)),
    ],
    "*": [
        (size * math.sin(math.pi * corner / 5), -size * math.cos(math.pi * corner / 5))
        for corner in range(10)
        for size in ((1.2,) if corner % 2 == 0 else (0.5,))
    ],
}
