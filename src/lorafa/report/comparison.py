"""A comparison as rows of text for the terminal, and as one HTML page with its curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorafa.errors import ConfigError
from lorafa.report.plots import svg
from lorafa.runs.comparison import RESULT, final_loss, heldout_curve, is_over
from lorafa.runs.record import RunDirectory
from lorafa.storage.whole import read_json, written_whole

HEADINGS = (
    "method",
    "learning rate",
    "seeds",
    "held-out loss",
    "difference",
    "steps to baseline",
    "s / step, measuring included",
    "trained",
)
PAGE = "comparison.html"
MISSING, DIVERGED = "-", "diverged"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a comparison's folder.

    Raises:
        ConfigError: there are none.
    """
    if not (folder / RESULT).is_file():
        raise ConfigError(f"{str(folder)!r} holds no {RESULT}. Give a folder that `lorafa compare` wrote.")
    rows: list[dict[str, Any]] = read_json(folder / RESULT)["methods"]
    return rows


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row as text, in the order of ``HEADINGS``; rows of earlier versions say neither at_end nor diverged."""
    diverged, missing = row.get("diverged", 0), DIVERGED if row.get("diverged") else MISSING
    difference, steps, seconds, trainable = (
        row[key] for key in ("difference", "steps_to_baseline", "seconds_a_step", "trainable")
    )
    return (
        row["method"],
        f"{row['lr']:.3g}" + (" (at the end of the rates tried)" if row.get("at_end") else ""),
        str(row["seeds"]) + (f", {diverged} diverged" if diverged else ""),
        _interval(row["loss"]) if row["loss"] else missing,
        _interval(difference, sign="+") if difference else missing,
        missing if steps is None else f"{steps:.0f}",
        MISSING if seconds is None else f"{seconds:.2f}",
        MISSING if trainable is None else f"{trainable:,}",
    )


def write_comparison(folder: str | Path) -> Path:
    """Write ``comparison.html`` into the folder and return its path.

    Raises:
        ConfigError: not the folder of a comparison.
    """
    folder = Path(folder)
    rows = read_rows(folder)
    templates = Environment(
        loader=PackageLoader("lorafa", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = templates.get_template("comparison.html").render(
        title=folder.resolve().name,
        headings=HEADINGS,
        rows=[cells(row) for row in rows],
        curves=_curves(folder, rows),
        rates=_rates(folder, rows),
    )
    path = folder / PAGE
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _interval(values: Mapping[str, Any], sign: str = "") -> str:
    half = values["half_width"]
    return f"{values['mean']:{sign}.4f}" + ("" if half is None else f" +- {half:.4f}")


def _runs(folder: Path, method: str) -> dict[tuple[float | None, int], RunDirectory]:
    """The runs of a method that finished or diverged, by (learning rate, seed)."""
    runs = [RunDirectory(path.parent) for path in sorted((folder / method).glob("*/config.yaml"))]
    return {(config.optim.lr, config.train.seed): run for run in runs if is_over(run) for config in (run.config(),)}


def _curves(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Held-out loss by step at each method's rate, mean over seeds: up to where the first of them diverged."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        runs = [run for (rate, _), run in _runs(folder, row["method"]).items() if rate == row["lr"]]
        by_step: dict[float, list[float]] = {}
        for run in runs:
            for step, loss in heldout_curve(run.metrics()):
                if math.isfinite(loss):
                    by_step.setdefault(step, []).append(loss)
        points = [(step, statistics.mean(at)) for step, at in sorted(by_step.items()) if len(at) == len(runs)]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=row["method"])
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per answer token")
    _finish(axes)
    return svg(figure)


def _rates(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Final held-out loss by learning rate, first seed: how each rate was chosen."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        runs = _runs(folder, row["method"])
        swept = {rate: run for (rate, seed), run in runs.items() if seed == row["swept_with"]}
        points = sorted((rate, loss) for rate, run in swept.items() if math.isfinite(loss := final_loss(run)))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=row["method"])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss after training")
    _finish(axes)
    return svg(figure)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    if axes.get_lines():  # without train.eval_every there is no curve to name
        axes.legend(frameon=False)
