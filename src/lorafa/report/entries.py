"""Run directories as reports of several need them: each file read once, and damage kept to the run it befell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorafa.errors import LoraError, first_line, shorten
from lorafa.report.defaults import Defaults
from lorafa.report.recorded import drawn_from
from lorafa.report.values import flat, is_measure
from lorafa.runs.differences import ELSEWHERE
from lorafa.runs.measures import Metrics
from lorafa.runs.plan import RESULT
from lorafa.runs.record import RunDirectory
from lorafa.storage.whole import read_json

OF_THE_PLACE = (*ELSEWHERE, "train.seed", "train.resume", "report_to", "report_project")
"""Settings in which two runs of one method may differ."""
FINISHED, DIVERGED, DAMAGED = "finished", "diverged", "damaged"


@dataclass(frozen=True)
class Entry:
    """One run."""

    path: Path
    name: str
    """Its path from the folder that holds all."""
    settings: Mapping[str, Any]
    """Flat: ``optim.lr`` -> value."""
    changed: Mapping[str, Any]
    """Settings that are not the default ones. What an earlier version did not know is none of them."""
    result: Mapping[str, Any]
    metrics: Metrics
    environment: Mapping[str, Any]
    status: str
    """finished, diverged, failed, running, unfinished, not started or damaged."""
    error: str | None = None
    chose: bool = False
    """It is one of a comparison's runs that chose a learning rate, which the comparison does not report."""

    @property
    def counts(self) -> bool:
        """Whether it is part of means and drawings."""
        return self.status == FINISHED and not self.chose

    @property
    def seed(self) -> int | None:
        return self.settings.get("train.seed")

    @property
    def samples(self) -> str | None:
        digest = self.result.get("samples_sha256")
        return None if digest is None else str(digest)

    @cached_property
    def method(self) -> str:
        """What runs of one method have in common: all settings but the seed and those of the place."""
        common = {key: value for key, value in self.changed.items() if key not in OF_THE_PLACE}
        return json.dumps(common, sort_keys=True)

    @cached_property
    def measures(self) -> dict[str, float]:
        """The scores without counts, which say how much was measured and are no score."""
        recorded = flat(self.result.get("after") or {})
        return {name: value for name, value in self.scores.items() if is_measure(recorded[name])}

    @cached_property
    def scores(self) -> dict[str, float]:
        """Finite numbers among what was measured after the training, nested ones by dotted names."""
        return {
            name: float(value)
            for name, value in flat(self.result.get("after") or {}).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }


def read_all(paths: Sequence[Path], within: Path, defaults: Defaults) -> list[Entry]:
    """Every run as it stands; one that cannot be read says so and stops no other."""
    comparisons = {folder: _comparison(folder) for folder in {path.parent.parent for path in paths}}
    return [_read(path, within, comparisons[path.parent.parent], defaults) for path in paths]


def comparison_of(entry: Entry) -> Mapping[str, Any]:
    """What the comparison a run belongs to has found; empty where it belongs to none."""
    return _comparison(entry.path.parent.parent)


def _comparison(folder: Path) -> Mapping[str, Any]:
    try:
        found = read_json(folder / RESULT) if (folder / RESULT).is_file() else {}
    except LoraError:
        return {}
    return found if _is_comparison(found) else {}


def _is_comparison(found: Mapping[str, Any]) -> bool:
    methods = found.get("methods")
    seeds = [found.get(name) or [] for name in ("choose", "seeds")]
    return (
        isinstance(methods, list)
        and all(isinstance(row, dict) and "method" in row and "lr" in row for row in methods)
        and all(isinstance(each, list) and all(type(seed) is int for seed in each) for each in seeds)
    )


def _read(path: Path, within: Path, comparison: Mapping[str, Any], defaults: Defaults) -> Entry:
    run, name = RunDirectory(path), str(path.absolute().relative_to(within))
    apart = set(comparison.get("choose") or ()) - set(comparison.get("seeds") or ())
    try:
        with drawn_from(path):
            settings, result = flat(run.settings()), run.result()
            metrics, environment = run.metrics(), run.environment()
            status, changed = _status(result), defaults.changed(settings)
            chose = settings.get("train.seed") in apart
    except (LoraError, OSError) as error:
        return Entry(path, name, {}, {}, {}, [], {}, DAMAGED, first_line(error))
    failure = result.get("error")
    return Entry(
        path,
        name,
        settings,
        changed,
        result,
        metrics,
        environment,
        status,
        None if failure is None or status == FINISHED else str(failure),
        chose=chose,
    )


def _status(result: Mapping[str, Any]) -> str:
    status, loss = result.get("status"), (result.get("after") or {}).get("loss")
    infinite = loss is not None and not math.isfinite(float(loss))
    if result.get("diverged") or infinite or str(result.get("error")).startswith("DivergedError"):
        return DIVERGED
    if status is None:
        return "not started"
    return "unfinished" if result.get("error") == "interrupted" else str(status)


def named_in_words(entries: Sequence[Entry]) -> str:
    """How many runs have which status: "3 finished, 1 failed"."""
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.status] = counts.get(entry.status, 0) + 1
    return shorten((f"{number} {status}" for status, number in counts.items()), len(counts))
