"""Drawings: bands, fronts, ticks, and the colour of the page's text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafa.report.plots import Dot, Series, curves, pareto, plane, short
from lorafa.report.styles import style_of


def test_a_drawing_takes_the_text_s_colour_and_fits_its_data() -> None:
    svg = str(curves([Series(style_of(0), [(100.0, [5.1, 5.3]), (200.0, [5.0, 5.2])])], "step", "loss"))
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "#ffffff" not in svg
    ticks = [float(text) for text in re.findall(r">(\d\.\d+)</text>", svg)]
    assert min(ticks) > 4.9  # a loss axis need not begin at 0


def test_nothing_to_draw_is_no_drawing() -> None:
    assert curves([Series(style_of(0), [])], "step", "loss") is None
    assert plane([Dot(style_of(0), 1.0, 1.0)], "x", "y", lower_is_better=True) is None


def test_a_band_is_drawn_where_seeds_differ_and_only_there() -> None:
    one, several = (
        str(curves([Series(style_of(0), [(1.0, [1.0]), (2.0, [1.0])])], "", "")),
        str(curves([Series(style_of(0), [(1.0, [1.0, 2.0]), (2.0, [1.0, 1.5])])], "", "")),
    )
    assert "FillBetweenPolyCollection" not in one
    assert "FillBetweenPolyCollection" in several


def test_the_front_is_what_nothing_beats() -> None:
    places = [(1, 5.0), (2, 3.0), (3, 4.0), (4, 1.0), (4, 2.0), (1, 6.0)]
    dots = [Dot(style_of(0), float(x), y) for x, y in places]
    assert pareto(dots, lower_is_better=True) == [0, 1, 3]
    assert pareto(dots, lower_is_better=False) == [5]
    beaten = [
        number
        for number, (x, y) in enumerate(places)
        if any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)
    ]
    assert sorted(set(range(6)) - set(beaten)) == [0, 1, 3]


def test_equal_dots_are_on_the_front_together() -> None:
    dots = [Dot(style_of(0), *place) for place in ((1.0, 1.0), (1.0, 1.0), (2.0, 0.5))]
    assert pareto(dots, lower_is_better=True) == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12), st.booleans())
def test_the_front_is_that_of_all_pairs_compared(places: list[tuple[int, int]], lower: bool) -> None:
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        better = one[1] <= other[1] if lower else one[1] >= other[1]
        return one[0] <= other[0] and better and one != other

    front = pareto([Dot(style_of(0), float(x), float(y)) for x, y in places], lower_is_better=lower)
    assert sorted(front) == [n for n, own in enumerate(places) if not any(beats(one, own) for one in places)]
    assert [places[n][0] for n in front] == sorted(places[n][0] for n in front)


def test_a_front_is_ringed_on_the_drawing() -> None:
    dots = [Dot(style_of(n), 10.0**n, 1.0 / (n + 1), 0.1) for n in range(3)]
    svg = str(plane(dots, "trained parameters", "loss", lower_is_better=True, log=True))
    assert "trained parameters" in svg
    for style in (style_of(n) for n in range(3)):
        assert style.colour in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e6, "5M"), (2_500_000, "2.5M"), (20_000, "20k"), (9000, "9000"), (0.1 + 0.2, "0.3"), (-3e9, "-3G"), (0, "0")],
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert short(value) == text
