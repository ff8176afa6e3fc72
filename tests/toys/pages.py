"""What is drawn on a page, read back from its SVG: names in legends, and the values of points."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, fromstring

_NAMES = {"svg": "http://www.w3.org/2000/svg"}


def axes_of(page: str, drawing: int) -> list[Element]:
    """The axes of one of the page's drawings."""
    whole = fromstring(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)[drawing])
    return [group for group in whole.iter() if re.fullmatch(r"axes_\d+", group.get("id", ""))]


def legend(axes: Element) -> dict[str, str]:
    """Name -> colour of its line, in the order of the legend."""
    (box,) = (group for group in axes.iter() if group.get("id", "").startswith("legend"))
    names = ["".join(text.itertext()) for text in box.iterfind(".//svg:text", _NAMES)]
    return dict(zip(names, map(_colour, _lines(box)), strict=True))


def curves(axes: Element) -> list[str]:
    """Colours of the lines."""
    return [_colour(line) for line in _lines(axes)]


def heights(axes: Element) -> dict[str, list[float]]:
    """Colour of a line with markers -> what its points say on a vertical axis that is not logarithmic."""
    ticks = [group for group in axes.iter() if group.get("id", "").startswith("ytick")]
    low, high = ticks[0], ticks[-1]
    a, b = (_places(tick)[0] for tick in (low, high))
    of_a, of_b = (float("".join(tick.itertext()).replace("\u2212", "-")) for tick in (low, high))
    return {
        _colour(line): [of_a + (y - a) * (of_b - of_a) / (b - a) for y in _places(line)]
        for line in _lines(axes)
        if _places(line)
    }


def _lines(group: Element) -> list[Element]:
    return [child for child in group if child.get("id", "").startswith("line2d")]


def _places(group: Element) -> list[float]:
    return [float(mark.get("y", "")) for mark in group.iterfind(".//svg:use", _NAMES)]


def _colour(line: Element) -> str:
    path = line.find("svg:path", _NAMES)
    found = None if path is None else re.search(r"stroke: (#\w+)", path.get("style", ""))
    assert found is not None
    return found[1]
