"""Any number of methods are told apart."""

from __future__ import annotations

from itertools import combinations, pairwise

from lorafa.report.styles import COLOURS, style_of, swatch


def test_no_two_methods_look_the_same() -> None:
    styles = [style_of(number) for number in range(2000)]
    assert len(set(styles)) == len(styles)
    assert len({swatch(style) for style in styles}) == len(styles)


def test_neighbours_differ_in_colour_and_in_mark_and_the_first_eight_in_both() -> None:
    styles = [style_of(number) for number in range(300)]
    assert all(a.colour != b.colour for a, b in pairwise(styles))
    assert all(a.colour != b.colour and a.mark != b.mark for a, b in combinations(styles[:8], 2))
    assert [style.dash for style in styles[:8]] == [()] * 8


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_is_seen_on_light_and_on_dark_paper() -> None:
    for colour in COLOURS:
        own = luminance(colour) + 0.05
        assert min(1.05 / own, own / (luminance("#14181f") + 0.05)) > 2, colour
