"""A run as one HTML file that needs no other file."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from lorafa.report.plots import loss_curve
from lorafa.report.recorded import drawn_from
from lorafa.report.starts import fact_rows_of_start, rank_rows, spectra_and_ranks
from lorafa.report.tables import fact_rows, score_rows
from lorafa.report.teacher import HEADINGS, decision_rows, divergence_curve
from lorafa.report.templates import write_page
from lorafa.runs.record import RunDirectory

PAGE = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory, finished or not, and return its path.

    Raises:
        ConfigError: not a run directory.
        CheckpointError: a file of the run is damaged, or the page could not be written.
    """
    run = RunDirectory.open(run_dir)
    result, environment, metrics = run.result(), run.environment(), run.metrics()
    with drawn_from(run.path):
        return write_page(
            run.path / PAGE,
            "page.html",
            title=run.path.resolve().name,
            scores=score_rows(result),
            facts=[*fact_rows(result, metrics), *fact_rows_of_start(result.get("start") or {})],
            ranks=rank_rows(result.get("start") or {}),
            spectra=spectra_and_ranks(result.get("start") or {}),
            curve=loss_curve(metrics),
            divergence=divergence_curve(metrics, result.get("decisions") or ()),
            decisions=decision_rows(result),
            decision_headings=HEADINGS,
            samples=result.get("samples") or [],
            command=shlex.join(environment.get("command", [])),
            environment=yaml.safe_dump(environment, sort_keys=False, allow_unicode=True),
            config=yaml.safe_dump(run.settings(), sort_keys=False, allow_unicode=True),
        )
