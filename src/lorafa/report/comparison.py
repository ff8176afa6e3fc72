"""A comparison as rows of text for the terminal, and as one HTML page with its curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafa.errors import ConfigError
from lorafa.report.plots import Series, curves
from lorafa.report.recorded import drawn_from
from lorafa.report.styles import style_of
from lorafa.report.tables import DIVERGED, MISSING, gib, in_spread, plus_minus
from lorafa.report.templates import Drawing, legend_of, marked, write_page
from lorafa.runs.measures import final_loss, heldout_curve, is_over, mean_curve
from lorafa.runs.plan import RESULT
from lorafa.runs.record import RunDirectory
from lorafa.storage.whole import read_json

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
BAND = "Lines are means over seeds, bands reach from the lowest to the highest."


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
    if "without_digest" not in result:
        texts.append("An earlier version wrote this, which did not look whether all runs saw the same samples.")
    elif result["without_digest"]:
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
        plus_minus(row["loss"]) if row["loss"] else missing,
        plus_minus(difference, sign="+") if difference else missing,
        missing if steps is None else f"{steps:.0f}",
        _seconds(seconds),
        _peak(row),
        MISSING if trainable is None else f"{trainable:,}",
    )


def write_comparison(folder: str | Path) -> Path:
    """Write ``comparison.html`` into the folder and return its path.

    Raises:
        ConfigError: not the folder of a comparison.
        CheckpointError: its result is damaged.
    """
    folder = Path(folder)
    result = read_result(folder)
    with drawn_from(folder):
        rows = result["methods"]
        return write_page(
            folder / PAGE,
            "comparison.html",
            title=folder.resolve().name,
            headings=HEADINGS,
            rows=[(marked(style_of(number), row["method"]), *cells(row)[1:]) for number, row in enumerate(rows)],
            notes=notes(result),
            drawings=[each for each in (_curves(folder, rows, result.get("seeds")), _rates(folder, rows)) if each],
        )


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
    settings = [(run, run.settings()) for run in runs if is_over(run)]
    return {(values["optim"]["lr"], values["train"]["seed"]): run for run, values in settings}


def _swept_with(row: Mapping[str, Any]) -> list[int]:
    """The seeds that chose; earlier versions name the one."""
    found = row["swept_with"]
    return list(found) if isinstance(found, list) else [found]


def _curves(folder: Path, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None) -> Drawing | None:
    """Held-out loss by step at each method's rate, mean over seeds: up to where the first of them diverged."""
    points = {}
    for row in rows:
        swept = [] if seeds is None else set(_swept_with(row)) - set(seeds)
        at_rate = {seed: run for (rate, seed), run in _runs(folder, row["method"]).items() if rate == row["lr"]}
        measured = [heldout_curve(run.metrics()) for seed, run in at_rate.items() if seed not in swept]
        points[row["method"]] = mean_curve(measured)
    return _drawing("Held-out loss by step", points, "step", "nats per answer token")


def _rates(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Final held-out loss by learning rate, mean of the seeds that choose: how each rate was chosen."""
    points = {}
    for row in rows:
        swept: dict[float, list[float]] = {}
        for (rate, seed), run in _runs(folder, row["method"]).items():
            if seed in _swept_with(row) and rate is not None:
                swept.setdefault(rate, []).append(final_loss(run))
        points[row["method"]] = sorted((rate, losses) for rate, losses in swept.items() if math.isfinite(sum(losses)))
    if not any(len(rates) > 1 for rates in points.values()):
        return None
    title = "How the learning rates were chosen: held-out loss after training"
    return _drawing(title, points, "learning rate", "nats per answer token", log=True)


def _drawing(
    title: str, points: Mapping[str, list[tuple[float, list[float]]]], across: str, up: str, log: bool = False
) -> Drawing | None:
    styles = {method: style_of(number) for number, method in enumerate(points)}
    svg = curves([Series(styles[method], each) for method, each in points.items()], across, up, log=log)
    named = [(styles[method], method) for method, each in points.items() if each]
    return None if svg is None else Drawing(title, svg, legend_of(named), BAND)
