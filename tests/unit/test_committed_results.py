"""Runs that were made with earlier versions can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.runs.record import RunDirectory

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("**/config.yaml"))


def test_there_are_some() -> None:
    assert RUNS


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run.relative_to(RESULTS)))
def test_a_committed_run_can_be_read(run: Path) -> None:
    config = RunDirectory.open(run).config()
    assert config.model.name
    assert config.init.mode
