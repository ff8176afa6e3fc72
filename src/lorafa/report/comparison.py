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
from lorafa.report.tables import gib, in_spread
from lorafa.runs.measures import final_loss, heldout_curve, is_over, mean_curve
from lorafa.runs.plan import RESULT
from lorafa.runs.record import RunDirectory
from lorafa.storage.whole import read_json, written_whole

HEADINGS = (
    "method",
    "learning rate",
    "seeds",
    "held-out loss",
    "difference",
    "steps to baseline",
    "s / step",
    "peak memory",
    "trained",
)
PAGE = "comparison.html"
MISSING, DIVERGED = "-", "diverged"


def read_result(folder: Path) -> dict[str, Any]:
    """What the comparison in a folder has found.

    Raises:
        ConfigError: there is none.
    """
    if not (folder / RESULT).is_file():
        raise ConfigError(f"{str(folder)!r} holds no {RESULT}. Give a folder that `lorafa compare` wrote.")
    return read_json(folder / RESULT)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the table does not show of how its figures were made, a sentence or two each."""
    rows: list[Mapping[str, Any]] = result["methods"]
    compared = max((row["difference"].get("comparisons", 1) for row in rows if row["difference"]), default=1)
    texts = [
        "Losses are means over seeds ± half of their 95 % interval (Student's t); the difference to the baseline is "
        "taken seed by seed.",
    ]
    if compared > 1:
        texts.append(
            f"The intervals of the {compared} differences are corrected for their number (Bonferroni): with 95 % they "
            "all hold at once."
        )
    elif sum(bool(row["difference"]) for row in rows) > 1:
        texts.append(
            "The intervals of the differences are not corrected for their number: of many, some miss zero by chance."
        )
    texts.append(_of_choosing(result))
    texts.append(
        "Steps to the baseline: where the mean held-out curve over the seeds reaches the last value of the baseline's "
        "mean curve. Seconds a step are medians, with the times a tenth of the steps lies below and above, and without "
        "measuring where the metrics tell it apart."
    )
    if any(row.get("kept_steps") for row in rows):
        kept = "; ".join(
            f"{row['method']}: {', '.join(map(str, row['kept_steps']))}" for row in rows if row.get("kept_steps")
        )
        texts.append(
            f"The weights are those of the best measurement on the way (train.keep_best), chosen on rows that are "
            f"reported, which flatters the loss. Steps kept: {kept}."
        )
    if result.get("without_digest", 1):
        texts.append(
            "Runs are recorded here without a digest of their samples, so nothing shows that all of them saw the same."
        )
    if any(row["diverged"] for row in rows if "diverged" in row):
        texts.append(
            "A method of which a run diverged has no mean: that of the other runs would say it is better than it is. "
            "Its curve ends where the first run diverged, and a rate that diverged is no point."
        )
    return texts


def _of_choosing(result: Mapping[str, Any]) -> str:
    choose, seeds = result.get("choose"), result.get("seeds")
    if choose is None or seeds is None:  # of an earlier version
        return (
            "The learning rate of each method was chosen with a seed that is among those reported, so losses are lower "
            "than those of new seeds would be."
        )
    if not choose:
        return "The learning rates were given, not chosen."
    named = f"seed {choose[0]}" if len(choose) == 1 else f"seeds {', '.join(map(str, choose))}"
    if set(choose) & set(seeds):
        return (
            f"The learning rates were chosen with {named}, and the losses are those of the same seed: the lowest of "
            "several, so lower than those of new seeds would be. Give the plan more seeds."
        )
    return f"The learning rates were chosen with {named}, which the table leaves out."


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row as text, in the order of ``HEADINGS``; rows of earlier versions have fewer entries."""
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
        _seconds(seconds),
        _peak(row),
        MISSING if trainable is None else f"{trainable:,}",
    )


def write_comparison(folder: str | Path) -> Path:
    """Write ``comparison.html`` into the folder and return its path.

    Raises:
        ConfigError: not the folder of a comparison.
    """
    folder = Path(folder)
    result = read_result(folder)
    rows = result["methods"]
    templates = Environment(
        loader=PackageLoader("lorafa", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = templates.get_template("comparison.html").render(
        title=folder.resolve().name,
        headings=HEADINGS,
        rows=[cells(row) for row in rows],
        notes=notes(result),
        curves=_curves(folder, rows, result.get("seeds")),
        rates=_rates(folder, rows),
    )
    path = folder / PAGE
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _interval(values: Mapping[str, Any], sign: str = "") -> str:
    half = values["half_width"]
    return f"{values['mean']:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def _seconds(times: Mapping[str, float] | float | None) -> str:
    if times is None:
        return MISSING
    return in_spread(times) if isinstance(times, Mapping) else f"{times:.2f}, measuring included"


def _peak(row: Mapping[str, Any]) -> str:
    """The peak of the process, and where there is one that of the accelerator; none where it is not the runs' own."""
    of_process, of_device = row.get("peak_rss_bytes"), row.get("peak_device_bytes")
    texts = [gib(of_process)] if of_process else []
    return " + ".join([*texts, *([f"{gib(of_device)} on the device"] if of_device else [])]) or MISSING


def _runs(folder: Path, method: str) -> dict[tuple[float | None, int], RunDirectory]:
    """The runs of a method that finished or diverged, by (learning rate, seed)."""
    runs = [RunDirectory(path.parent) for path in sorted((folder / method).glob("*/config.yaml"))]
    return {(config.optim.lr, config.train.seed): run for run in runs if is_over(run) for config in (run.config(),)}


def _swept_with(row: Mapping[str, Any]) -> list[int]:
    """The seeds that chose; earlier versions name the one."""
    found = row["swept_with"]
    return list(found) if isinstance(found, list) else [found]


def _curves(folder: Path, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None) -> str:
    """Held-out loss by step at each method's rate, mean over seeds: up to where the first of them diverged."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        swept = [] if seeds is None else set(_swept_with(row)) - set(seeds)
        at_rate = {seed: run for (rate, seed), run in _runs(folder, row["method"]).items() if rate == row["lr"]}
        runs = [run for seed, run in at_rate.items() if seed not in swept]
        measured = mean_curve([heldout_curve(run.metrics()) for run in runs])
        points = [(step, statistics.mean(losses)) for step, losses in measured]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=row["method"])
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per answer token")
    _finish(axes)
    return svg(figure)


def _rates(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Final held-out loss by learning rate, mean of the seeds that choose: how each rate was chosen."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        runs = _runs(folder, row["method"])
        swept: dict[float | None, list[float]] = {}
        for (rate, seed), run in runs.items():
            if seed in _swept_with(row):
                swept.setdefault(rate, []).append(final_loss(run))
        points = sorted((rate, mean) for rate, at in swept.items() if math.isfinite(mean := statistics.mean(at)))
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
