"""Runs put together: those that saw the same samples in one section, those that differ in the seed alone in one method.

What is said of a method is a mean over its seeds; what is said of two is taken seed by seed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorafa.errors import ConfigError, shorten
from lorafa.report.entries import OF_THE_PLACE, Entry, comparison_of
from lorafa.report.styles import Style, style_of
from lorafa.report.values import written
from lorafa.runs.measures import spread, step_seconds
from lorafa.runs.student import interval

MOST_IN_NAME = 3
"""Settings that name a method where the folders of its runs do not."""
_SEED = re.compile(r"[-_,/]?(?:train\.)?seed[-=_]?\d+")


@dataclass(frozen=True)
class Method:
    """Runs with the same settings but for the seed."""

    name: str
    runs: Sequence[Entry]
    style: Style

    def by_seed(self, measure: Callable[[Entry], float | None]) -> dict[int | None, float]:
        """Seed -> the measure, of runs with one seed their mean; without those that do not have it."""
        found: dict[int | None, list[float]] = {}
        for run in self.runs:
            if (value := measure(run)) is not None:
                found.setdefault(run.seed, []).append(value)
        return {seed: statistics.mean(values) for seed, values in found.items()}

    def interval(self, measure: Callable[[Entry], float | None]) -> dict[str, Any]:
        """The mean over seeds with its interval; empty without any."""
        return interval(list(self.by_seed(measure).values()))

    @cached_property
    def seconds_a_step(self) -> dict[str, float] | None:
        return spread([second for run in self.runs for second in step_seconds(run.metrics)])

    @property
    def trainable(self) -> int | None:
        sizes = [run.result["parameters"]["trainable"] for run in self.runs if run.result.get("parameters")]
        return int(sizes[0]) if sizes else None

    def peak(self, name: str) -> int | None:
        """The largest peak of its runs; None where one has none of its own."""
        if name == "peak_rss_bytes" and any(run.result.get("peak_rss_of") != "run" for run in self.runs):
            return None
        peaks = [run.result.get(name) for run in self.runs]
        return None if None in peaks else max(peaks, default=None)  # type: ignore[type-var]


@dataclass(frozen=True)
class Section:
    """Methods whose runs saw the same samples."""

    samples: str | None
    """Their SHA-256; None where it was not recorded."""
    methods: Sequence[Method]
    baseline: Method
    left_out: Sequence[Entry] = field(default_factory=list)
    """Runs on these samples that are part of no mean."""

    @property
    def runs(self) -> list[Entry]:
        return [run for method in self.methods for run in method.runs]

    def differences(self, measure: Callable[[Entry], float | None]) -> dict[str, dict[str, Any]]:
        """Method -> the mean difference to the baseline, seed by seed, with an interval for all of them together."""
        of_baseline = self.baseline.by_seed(measure)
        found = {}
        for method in self.methods:
            own = method.by_seed(measure)
            pairs = [own[seed] - value for seed, value in of_baseline.items() if seed in own]
            if method is not self.baseline and pairs:
                found[method.name] = pairs
        return {name: interval(pairs, len(found)) for name, pairs in found.items()}

    def varying(self) -> list[str]:
        """Settings in which its methods differ."""
        first = [method.runs[0].changed for method in self.methods]
        names = dict.fromkeys(name for settings in first for name in settings)
        return [name for name in names if name not in OF_THE_PLACE and _differs(first, name)]


def sections(entries: Sequence[Entry], baseline: str | None = None) -> list[Section]:
    """The sections of a page, the largest first.

    Args:
        baseline: name of the method others are measured against; None takes a comparison's own, or the first.

    Raises:
        ConfigError: no section has a method of that name.
    """
    by_samples: dict[str | None, list[Entry]] = {}
    for entry in entries:
        if entry.counts:
            by_samples.setdefault(entry.samples, []).append(entry)
    found = []
    for samples, runs in sorted(by_samples.items(), key=lambda item: -len(item[1])):
        methods = _methods(runs)
        chosen = next((method for method in methods if method.name == baseline), None)
        left_out = [entry for entry in entries if not entry.counts and samples and entry.samples == samples]
        found.append(Section(samples, methods, chosen or _own_baseline(methods), left_out))
    names = [method.name for section in found for method in section.methods]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"No method is called {baseline!r}; there are {shorten(names, 12)}. Give one as --baseline.")
    return found


def _own_baseline(methods: Sequence[Method]) -> Method:
    for method in methods:
        comparison = comparison_of(method.runs[0])
        if comparison.get("baseline") == method.runs[0].path.parent.name and any(
            row["method"] == comparison["baseline"] and row["lr"] == method.runs[0].settings.get("optim.lr")
            for row in comparison["methods"]
        ):
            return method
    return methods[0]


def _methods(runs: Sequence[Entry]) -> list[Method]:
    together: dict[str, list[Entry]] = {}
    for run in runs:
        together.setdefault(run.method, []).append(run)
    groups = list(together.values())
    by_folder = [{_SEED.sub("", run.name) or run.name for run in group} for group in groups]
    clear = all(len(names) == 1 for names in by_folder) and len(set().union(*by_folder)) == len(groups)
    names = [min(names) for names in by_folder] if clear else _names_by_settings(groups)
    return [Method(name, group, style_of(n)) for n, (name, group) in enumerate(zip(names, groups, strict=True))]


def _names_by_settings(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """What differs between the groups, or where that is much the directory of the first run; all different."""
    first = [group[0].changed for group in groups]
    keys = dict.fromkeys(key for settings in first for key in settings if key not in OF_THE_PLACE)
    differ = [key for key in keys if _differs(first, key)]
    if differ and len(differ) <= MOST_IN_NAME:
        return [", ".join(f"{key}={written(group[0].settings.get(key))}" for key in differ) for group in groups]
    return [group[0].name for group in groups]


def _differs(settings: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(each.get(name) != settings[0].get(name) for each in settings[1:])
