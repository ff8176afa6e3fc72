"""The result of a run as rows of text, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lorafa.runs.record import RunDirectory

MISSING = "-"
PHASES = ("prepare", "evaluate before", "train", "evaluate after", "total")


def score_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, before, after) of what result.json holds; a dash stands for what was not measured."""
    before, after = result.get("before") or {}, result.get("after") or {}
    rows = []
    measures = (("held-out accuracy", _accuracy), ("answers without a number", _unparsed), ("answer loss", _loss))
    for label, cell in measures:
        pair = cell(before), cell(after)
        if pair != (MISSING, MISSING):
            rows.append((label, *pair))
    return rows


def fact_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything else worth a line: status, sizes, times."""
    seconds, sizes = result.get("seconds") or {}, result.get("parameters") or {}
    rows = [("status", str(result.get("status", "not started")))]
    if result.get("error"):
        rows.append(("error", str(result["error"])))
    if sizes:
        share = sizes["trainable"] / sizes["all"]
        rows.append(("trained parameters", f"{sizes['trainable']:,} of {sizes['all']:,} ({share:.2%})"))
    if "steps" in result:
        rows.append(("steps", f"{result['steps']:,}"))
    rows += [(f"time: {name}", duration(seconds[name])) for name in PHASES if name in seconds]
    if result.get("peak_rss_bytes"):
        rows.append(("peak memory", f"{result['peak_rss_bytes'] / 2**30:.2f} GiB"))
    return rows


def result_table(run: RunDirectory) -> Table:
    """Scores before and after, then the facts, as one table."""
    result = run.result()
    table = Table(title=str(run.path), title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, before, after in score_rows(result):
        table.add_row(label, before, after)
    table.add_section()
    for name, value in fact_rows(result):
        table.add_row(name, "", value)
    return table


def duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _accuracy(scores: Mapping[str, Any]) -> str:
    if scores.get("accuracy") is None:
        return MISSING
    low, high = scores["interval"]
    return f"{scores['accuracy']:.1%} ({scores['correct']}/{scores['total']}; 95 %: {low:.1%} to {high:.1%})"


def _unparsed(scores: Mapping[str, Any]) -> str:
    return MISSING if scores.get("unparsed") is None else str(scores["unparsed"])


def _loss(scores: Mapping[str, Any]) -> str:
    return MISSING if scores.get("loss") is None else f"{scores['loss']:.4f}"
