"""Drawings as SVG text, to stand inside a page: text and axes take the colour of the page's text, light or dark."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lorafa.report.styles import Style, style_of

SMOOTHING = 0.9
"""Weight of the past in the running mean of the loss."""
SIZE = (5.4, 3.3)
"""Inches: small enough that the text can be read where a phone makes the drawing as wide as its screen."""
TALL = (5.4, 5.4)
"""The same with two drawings, one above the other."""
MOST_MARKS = 20
"""Points of a curve that carry a mark."""
_INK = "#010203"
"""Stands for the colour of text until the drawing is text itself."""


@dataclass(frozen=True)
class Series:
    """What is drawn of one method."""

    style: Style
    points: Sequence[tuple[float, Sequence[float]]]
    """(place on the horizontal axis, the values of all seeds there), from left to right."""


@dataclass(frozen=True)
class Dot:
    """One method in a plane of two measures."""

    style: Style
    x: float
    y: float
    half_width: float | None = None
    """Half of the width of the interval of y."""


def drawn(draw: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> str:
    """The SVG text of what ``draw`` puts on a figure; equal drawings give equal text."""
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "lorafa", "font.family": "sans-serif", "font.size": 9.5}
    with rc_context({**fixed, **dict.fromkeys(ink, _INK), "axes.facecolor": "none", "figure.facecolor": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def curves(series: Sequence[Series], across: str, up: str, *, log: bool = False, marks: bool = True) -> str | None:
    """A curve of means for each method, with a band from the lowest to the highest seed; None without a point.

    Args:
        across, up: what the axes show.
        log: the horizontal axis is logarithmic.
    """
    filled = [each for each in series if each.points]
    if not filled:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for each in filled:
            x = [place for place, _ in each.points]
            means = [statistics.mean(values) for _, values in each.points]
            every = math.ceil(len(x) / MOST_MARKS)
            look: dict[str, Any] = {"color": each.style.colour, **dashes(each.style)}
            if marks or len(x) == 1:
                look |= {"marker": each.style.mark, "markersize": 4, "markevery": every}
            axes.plot(x, means, linewidth=1.4, **look)
            low, high = ([end(values) for _, values in each.points] for end in (min, max))
            if low != high and len(x) > 1:
                axes.fill_between(x, low, high, color=each.style.colour, alpha=0.18, linewidth=0)
        finish(axes, across, up, log=log)

    return drawn(draw)


def plane(dots: Sequence[Dot], across: str, up: str, *, lower_is_better: bool, log: bool = False) -> str | None:
    """Methods by two measures, the Pareto front ringed and joined: where less of x never comes with a better y.

    None with fewer than two methods, which leave nothing to weigh.
    """
    if len(dots) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        front = [dots[number] for number in pareto(dots, lower_is_better)]
        stairs = [dot.x for dot in front], [dot.y for dot in front]
        axes.plot(*stairs, color=_INK, alpha=0.5, linewidth=1, drawstyle="steps-post")
        axes.plot(*stairs, "o", markersize=11, fillstyle="none", color=_INK, markeredgewidth=1)
        for dot in dots:
            error = None if dot.half_width is None else [dot.half_width]
            look: dict[str, Any] = {"color": dot.style.colour, "marker": dot.style.mark, "markersize": 6}
            axes.errorbar([dot.x], [dot.y], error, capsize=2, **look)
        finish(axes, across, up, log=log)

    return drawn(draw)


def pareto(dots: Sequence[Dot], lower_is_better: bool) -> list[int]:
    """The numbers of the dots that no other one beats in one measure without being worse in the other, by rising x;
    equal dots beat none of each other."""
    sign = 1 if lower_is_better else -1
    place = {number: (dot.x, sign * dot.y) for number, dot in enumerate(dots)}
    front: list[int] = []
    for number in sorted(place, key=place.__getitem__):
        if not front or place[number][1] < place[front[-1]][1] or place[number] == place[front[-1]]:
            front.append(number)
    return front


def finish(axes: Axes, across: str, up: str, *, log: bool = False, log_up: bool = False) -> None:
    """Names, a grid, and ticks that have room for their numbers; axes begin where the data do."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.2)
    axes.margins(0.04, 0.08)
    for scale, axis, logarithmic, most in (("x", axes.xaxis, log, 6), ("y", axes.yaxis, log_up, 6)):
        if not logarithmic:
            axis.set_major_locator(MaxNLocator(most))
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            continue
        getattr(axes, f"set_{scale}scale")("log")
        low, high = getattr(axes, f"get_{scale}lim")()
        decades = math.log10(high / low)
        subs = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """``5,000,000`` -> ``5M``; other numbers without what rounding has left."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{round(value, 12):.6g}"


def dashes(style: Style) -> dict[str, Any]:
    """The dash as matplotlib takes it."""
    return {"linestyle": (0, style.dash)} if style.dash else {"linestyle": "-"}


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Training loss by step with its running mean, the held-out loss where it was measured; None without any."""
    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    heldout = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
    if not train:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#8fa9c9", linewidth=1, alpha=0.8, label="training loss")
        axes.plot(steps, running_mean(losses), color=style_of(0).colour, linewidth=2, label="running mean")
        if heldout:
            axes.plot(*zip(*heldout, strict=True), color=style_of(1).colour, marker="o", label="held-out loss")
        finish(axes, "step", "nats per trained token")
        axes.legend(frameon=False)

    return drawn(draw)


def running_mean(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential mean, corrected for its start as in Adam (arXiv:1412.6980, section 3)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means
