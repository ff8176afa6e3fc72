"""The result of a run as rows of text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group

from lorafa.report.fitted import Facts, Fitted
from lorafa.report.recorded import drawn_from
from lorafa.report.values import flat, is_measure, is_number
from lorafa.runs.measures import Metrics, spread, step_seconds
from lorafa.runs.record import RunDirectory

MISSING, DIVERGED = "-", "diverged"
SHOWN = frozenset({"accuracy", "loss"})
"""Measures with a row or a column of their own making; those of other evaluations are shown by their names."""
IN_OTHER_ROWS = frozenset({"correct", "total", "unparsed", "cut", "max_new_tokens", "max_length"})
"""Counts that stand beside these measures, and the lengths within which they were measured."""
PHASES = ("prepare", "evaluate before", "train", "evaluate after", "total")


def score_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, before, after) of what result.json holds; a dash stands for what was not measured."""
    before, after = result.get("before") or {}, result.get("after") or {}
    rows = []
    measures = (
        ("held-out accuracy", _accuracy),
        ("  95 % interval", _interval),
        ("  without an answer", _unparsed),
        ("  cut at their longest", _cut),
        ("answer loss", _loss),
    )
    for label, cell in measures:
        pair = cell(before), cell(after)
        if pair != (MISSING, MISSING):
            rows.append((label, *pair))
    nested = flat(before), flat(after)
    others = {name for scores in nested for name, value in scores.items() if is_number(value)} - SHOWN - IN_OTHER_ROWS
    first, last = nested
    return rows + [(name, _number(first.get(name)), _number(last.get(name))) for name in sorted(others)]


def fact_rows(result: Mapping[str, Any], metrics: Metrics = ()) -> list[tuple[str, str]]:
    """(name, value) of everything else worth a line: status, sizes, rows, times; seconds a step from the metrics."""
    seconds, sizes = result.get("seconds") or {}, result.get("parameters") or {}
    rows = [("status", str(result.get("status", "not started")))]
    if result.get("error"):
        rows.append(("error", str(result["error"])))
    if sizes:
        share = sizes["trainable"] / sizes["all"]
        rows.append(("trained parameters", f"{sizes['trainable']:,} of {sizes['all']:,} ({share:.2%})"))
    rows += _rows_of_data(result.get("rows") or {})
    if "steps" in result:
        rows.append(("steps", f"{result['steps']:,}"))
    if result.get("stopped"):
        rows.append(("stopped", str(result["stopped"])))
    if result.get("kept_step") is not None:
        rows.append(("weights kept", kept_in_words(result)))
    if times := spread(step_seconds(metrics)):
        rows.append(("time of a step", f"{in_spread(times)} s, median (a tenth of the steps is below, one above)"))
    rows += [(f"time: {name}", duration(seconds[name])) for name in PHASES if name in seconds]
    if result.get("peak_rss_bytes"):
        own = result.get("peak_rss_of") == "run"
        rows.append(("peak memory" if own else "peak memory of its process", gib(result["peak_rss_bytes"])))
    if result.get("peak_device_bytes"):
        rows.append(("peak memory, accelerator", gib(result["peak_device_bytes"])))
    return rows


def kept_in_words(result: Mapping[str, Any]) -> str:
    """Which step ``train.keep_best`` chose, and on what."""
    return (
        f"those of step {result['kept_step']:,}, chosen on {result['kept_by_rows']:,} of the held-out rows that are "
        "reported, which flatters the loss after training"
    )


def in_spread(times: Mapping[str, float]) -> str:
    """``6.1 (5.9 to 6.6)``, or the median alone where all agree."""
    median, low, high = (f"{times[name]:.3g}" for name in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def plus_minus(values: Mapping[str, Any], sign: str = "", form: str = ".4f") -> str:
    """``0.6914 ± 0.0031``, or the mean alone where it has no interval."""
    half = values["half_width"]
    return f"{values['mean']:{sign}{form}}" + ("" if half is None else f" ± {half:{form}}")


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _rows_of_data(rows: Mapping[str, int]) -> list[tuple[str, str]]:
    """How many rows there were, and how many were left out or cut: always said, a zero too."""
    if not rows:
        return []
    return [
        ("rows", f"{rows['train']:,} trained on, {rows['heldout']:,} held out"),
        ("rows left out", f"{rows['dropped']:,} for their length, {rows['repeated']:,} repeat a held-out one"),
        ("rows cut", f"{rows['truncated']:,}"),
    ]


def result_tables(run: RunDirectory) -> Group:
    """For the terminal: the facts, then the scores before and after. Print it with ``crop=False``.

    Raises:
        CheckpointError: a file of the run is damaged.
    """
    result, metrics = run.result(), run.metrics()
    with drawn_from(run.path):
        facts, scores = Facts(fact_rows(result, metrics)), score_rows(result)
    return Group(facts, Fitted(("", "before", "after"), scores, left=1)) if scores else Group(facts)


def duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _accuracy(scores: Mapping[str, Any]) -> str:
    if scores.get("accuracy") is None:
        return MISSING
    counted = f" ({scores['correct']}/{scores['total']})" if {"correct", "total"} <= scores.keys() else ""
    return f"{scores['accuracy']:.1%}{counted}"


def _interval(scores: Mapping[str, Any]) -> str:
    return "{:.1%} to {:.1%}".format(*scores["interval"]) if scores.get("interval") else MISSING


def _unparsed(scores: Mapping[str, Any]) -> str:
    return MISSING if scores.get("unparsed") is None else str(scores["unparsed"])


def _cut(scores: Mapping[str, Any]) -> str:
    return MISSING if scores.get("cut") is None else str(scores["cut"])


def _number(value: Any) -> str:
    return (f"{value:,.4g}" if is_measure(value) else f"{value:,}") if is_number(value) else MISSING


def _loss(scores: Mapping[str, Any]) -> str:
    return MISSING if scores.get("loss") is None else f"{scores['loss']:.4f}"
