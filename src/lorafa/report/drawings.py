"""What a page of several runs draws of a section: curves over steps, and what methods score for what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from lorafa.report.entries import Entry
from lorafa.report.methods import Method, Section
from lorafa.report.plots import TALL, Dot, Series, curves, dashes, drawn, finish, plane, running_mean
from lorafa.report.starts import block_of, median_spectrum
from lorafa.report.templates import Drawing, legend_of
from lorafa.runs.measures import Curve, curve, heldout_curve, mean_curve

BANDS = "Bands reach from the lowest seed to the highest."
FRONT = "Ringed and joined: the Pareto front. Bars are 95 % intervals over seeds."
MIB = 2**20

Measure = Callable[[Entry], float | None]


def drawings(section: Section) -> list[Drawing]:
    """All drawings for which the runs of a section have something to show."""
    over_steps = (
        ("Held-out loss", "nats a token", lambda run: heldout_curve(run.metrics), True),
        ("Training loss, running mean", "nats a token", _smoothed, False),
        ("Divergence from the teacher", "nats a token", lambda run: curve(run.metrics, "divergence"), False),
        ("Learning rate", "learning rate", lambda run: curve(run.metrics, "lr"), False),
        ("Gradient norm, running mean", "norm", lambda run: _smoothed(run, "grad_norm"), False),
    )
    found = [_over_steps(section, *each) for each in over_steps]
    score = accuracy if any(accuracy(run) is not None for run in section.runs) else loss
    forgotten = dict.fromkeys(name for run in section.runs for name in run.measures if name.startswith("forgetting"))
    for measure in (loss, accuracy):
        found.append(_against(section, measure, "trained parameters", lambda method: method.trainable, log=True))
        for name, place in (("peak_rss_bytes", ""), ("peak_device_bytes", " of the accelerator")):
            found.append(_against(section, measure, f"peak memory{place}, MiB", _peak(name)))
    for name in forgotten:
        found.append(_against(section, score, name.replace("_", " "), _mean_of(name)))
    found.append(_starts(section))
    return [each for each in found if each is not None]


def loss(run: Entry) -> float | None:
    return run.scores.get("loss")


def accuracy(run: Entry) -> float | None:
    return run.scores.get("accuracy")


def _over_steps(section: Section, title: str, up: str, read: Callable[[Entry], Curve], marks: bool) -> Drawing | None:
    read_of = {method.name: [found for run in method.runs if (found := read(run))] for method in section.methods}
    points = {name: mean_curve(found) for name, found in read_of.items()}
    shown = [method for method in section.methods if points[method.name]]
    svg = curves([Series(method.style, points[method.name]) for method in shown], "step", up, marks=marks)
    several = any(len(values) > 1 for method in shown for _, values in points[method.name][:1])
    return None if svg is None else Drawing(title, svg, _legend(shown), BANDS if several else "")


def _smoothed(run: Entry, name: str = "loss") -> Curve:
    points = curve(run.metrics, name)
    return list(zip([step for step, _ in points], running_mean([value for _, value in points]), strict=True))


def _against(
    section: Section, measure: Measure, across: str, cost: Callable[[Method], float | None], log: bool = False
) -> Drawing | None:
    """A score against a cost, one dot a method that has both."""
    dots, shown = [], []
    for method in section.methods:
        found, x = method.interval(measure), cost(method)
        if found and x is not None:
            dots.append(Dot(method.style, x, found["mean"], found["half_width"]))
            shown.append(method)
    higher = measure is accuracy
    log = log and min((dot.x for dot in dots), default=0) > 0 and len({dot.x for dot in dots}) > 1
    up = "accuracy" if higher else "held-out loss"
    svg = plane(dots, across, up, lower_is_better=not higher, log=log)
    title = f"{'Accuracy' if higher else 'Held-out loss'} against {across}"
    return None if svg is None else Drawing(title, svg, _legend(shown), FRONT)


def _peak(name: str) -> Callable[[Method], float | None]:
    def peak(method: Method) -> float | None:
        found = method.peak(name)
        return None if found is None else found / MIB

    return peak


def _mean_of(name: str) -> Callable[[Method], float | None]:
    def mean(method: Method) -> float | None:
        values = method.by_seed(lambda run: run.scores.get(name)).values()
        return statistics.mean(values) if values else None

    return mean


def _starts(section: Section) -> Drawing | None:
    """Above, the median spectrum of all layers of each method's start; below, the mean rank in each block."""
    starts: dict[str, Mapping[str, Any]] = {}
    for method in section.methods:
        start = method.runs[0].result.get("start") or {}
        if start.get("ranks") and start.get("spectra"):
            starts[method.name] = start
    shown = [method for method in section.methods if method.name in starts]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1)
        for method in shown:
            start, style = starts[method.name], method.style
            if middle := median_spectrum(start["spectra"], list(start["ranks"])):
                places = range(1, len(middle) + 1)
                above.plot(places, middle, color=style.colour, linewidth=1.4, **dashes(style))
            blocks: dict[int, list[int]] = {}
            for layer, rank in start["ranks"].items():
                blocks.setdefault(block_of(layer), []).append(rank)
            x = sorted(blocks)
            means = [statistics.mean(blocks[block]) for block in x]
            below.plot(x, means, color=style.colour, marker=style.mark, markersize=3, linewidth=0.8)
        finish(above, "direction", "singular value / largest", log_up=True)
        finish(below, "block", "mean rank")

    title = "Starts from data: median spectrum of the layers, and ranks by block"
    return Drawing(title, drawn(draw, TALL), _legend(shown), "Of the first seed of each method.")


def _legend(methods: list[Method]) -> list[tuple[str, str]]:
    return legend_of([(method.style, method.name) for method in methods])
