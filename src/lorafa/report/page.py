"""A run as one HTML file that needs no other file."""

from __future__ import annotations

from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lorafa.report.plots import loss_curve
from lorafa.report.starts import fact_rows_of_start, rank_rows, spectra_and_ranks
from lorafa.report.tables import fact_rows, score_rows
from lorafa.runs.record import RunDirectory
from lorafa.storage.whole import written_whole

PAGE = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory, finished or not, and return its path.

    Raises:
        ConfigError: not a run directory.
        CheckpointError: a file of the run is damaged, or the page could not be written.
    """
    run = RunDirectory.open(run_dir)
    path = run.path / PAGE
    with written_whole(path) as temporary:
        temporary.write_text(_html(run), encoding="utf-8")
    return path


def _html(run: RunDirectory) -> str:
    templates = Environment(
        loader=PackageLoader("lorafa", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    result = run.result()
    environment = run.environment()
    return templates.get_template("page.html").render(
        title=run.path.resolve().name,
        scores=score_rows(result),
        facts=[*fact_rows(result, run.metrics()), *fact_rows_of_start(result.get("start") or {})],
        ranks=rank_rows(result.get("start") or {}),
        spectra=spectra_and_ranks(result.get("start") or {}),
        curve=loss_curve(run.metrics()),
        samples=result.get("samples") or [],
        command=" ".join(environment.get("command", [])),
        environment=yaml.safe_dump(environment, sort_keys=False, allow_unicode=True),
        config=yaml.safe_dump(run.settings(), sort_keys=False, allow_unicode=True),
    )
