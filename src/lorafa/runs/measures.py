"""What is measured of a run, read from its directory: losses, curves, times of steps, the samples it saw.

Reports and comparisons read runs by these functions alone, so a figure has one rule wherever it stands. Loads no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lorafa.errors import ConfigError
from lorafa.runs.record import RunDirectory

Metrics = Sequence[Mapping[str, Any]]
Curve = list[tuple[float, float]]


def is_over(run: RunDirectory) -> bool:
    """Whether the run finished or diverged: it has a :func:`final_loss` and is not run again."""
    result = run.result()
    return result.get("status") == "finished" or bool(result.get("diverged"))


def final_loss(run: RunDirectory) -> float:
    """Held-out loss after training, nats a token; inf where the run diverged or the loss is not finite.

    Raises:
        ConfigError: it holds no rows out, or was not measured.
    """
    result = run.result()
    if result.get("diverged"):
        return math.inf
    after = result.get("after") or {}
    if "loss" not in after:
        if own := [name for name in after if name != "forgetting"]:
            raise ConfigError(
                f"The run {str(run.path)!r} measures {', '.join(own)} and no loss of answers, by which runs are "
                "compared. `lorafa report` shows runs of such an objective side by side."
            )
        raise ConfigError(
            f"The run {str(run.path)!r} holds no rows out, so it has no loss to be compared by. Set data.eval_size."
        )
    loss = math.inf if after["loss"] is None else float(after["loss"])
    return loss if math.isfinite(loss) else math.inf


def samples_of(run: RunDirectory) -> str | None:
    """SHA-256 of the samples a run trained on and was measured on; None where it was recorded without."""
    digest = run.result().get("samples_sha256")
    return None if digest is None else str(digest)


def curve(metrics: Metrics, name: str) -> Curve:
    """(step, value) of every line that holds a finite ``name``; of a step measured twice the last one."""
    return list({
        float(row["step"]): (float(row["step"]), float(row[name]))
        for row in metrics
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    }.values())  # fmt: skip


def heldout_curve(metrics: Metrics) -> Curve:
    """(step, held-out loss) of every measurement on the way."""
    return curve(metrics, "eval_loss")


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, list[float]]]:
    """(step, the values of all curves) at the steps that every curve has: up to where the first one ends."""
    by_step: dict[float, list[float]] = {}
    for each in curves:
        for step, value in each:
            by_step.setdefault(step, []).append(value)
    return [(step, values) for step, values in sorted(by_step.items()) if len(values) == len(curves)]


def steps_to(points: Curve, goal: float) -> float | None:
    """The step at which a curve first reaches ``goal`` from above, between two measurements by a straight line."""
    for number, (step, loss) in enumerate(points):
        if loss <= goal:
            if number == 0:
                return step
            before, above = points[number - 1]
            return before + (step - before) * (above - goal) / (above - loss)
    return None


def steps_to_baseline(curves: Sequence[Curve], baseline: Sequence[Curve]) -> float | None:
    """The step at which the mean held-out curve of a method reaches the last value of the baseline's mean curve.

    Both means are over seeds. The baseline's own is its last step, or an earlier one where its curve rises at the end.
    None where the curve stays above, or one of the two has none.
    """
    of_method, of_baseline = ([(s, statistics.mean(v)) for s, v in mean_curve(each)] for each in (curves, baseline))
    return steps_to(of_method, of_baseline[-1][1]) if of_baseline else None


def step_seconds(metrics: Metrics) -> list[float]:
    """Seconds a step, one value a logged line of the training; measuring on the way is left out, and so is the first
    line, which holds what is made once."""
    times = []
    for before, row in pairwise(metrics):
        steps = row["step"] - before["step"]
        if steps > 0 and "loss" in row and "seconds" in row and "seconds" in before:
            times.append((row["seconds"] - before["seconds"]) / steps)
    return times


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, and the values that a tenth lies below and above; None without any."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[math.floor(0.1 * last)],
        "high": ordered[math.ceil(0.9 * last)],
    }
