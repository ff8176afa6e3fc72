"""Runs that were made with earlier versions can be read, and mean what they meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafa.conf.typed import plain
from lorafa.runs.record import RunDirectory
from toys.places import ROOT

RESULTS = ROOT / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("**/config.yaml"))


def test_there_are_some() -> None:
    assert RUNS


def those_of(recorded: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings that were read, those the file has: a version since may know more."""
    return {
        key: those_of(value, read[key]) if isinstance(value, Mapping) and value else read[key]
        for key, value in recorded.items()
    }


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run.relative_to(RESULTS)))
def test_a_committed_run_is_read_with_the_settings_of_its_file(run: Path) -> None:
    recorded = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert recorded.keys() >= {"model", "data", "peft", "optim", "train"}
    assert those_of(recorded, plain(RunDirectory.open(run).config())) == recorded
