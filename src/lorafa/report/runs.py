"""Any number of runs as one HTML file that needs no other file, and as a table for the terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lorafa.errors import CheckpointError, ConfigError, shorten
from lorafa.report.defaults import Defaults
from lorafa.report.drawings import accuracy, drawings, loss
from lorafa.report.entries import DAMAGED, OF_THE_PLACE, Entry, named_in_words, read_all
from lorafa.report.found import PAGE, common_folder, find
from lorafa.report.methods import Method, Section, sections
from lorafa.report.recorded import drawn_from
from lorafa.report.starts import rank_rows
from lorafa.report.styles import swatch
from lorafa.report.tables import MISSING, SHOWN, duration, gib, in_spread, plus_minus
from lorafa.report.templates import marked, write_page
from lorafa.report.values import written
from lorafa.storage.paths import user_path

ANSWERS = 5
"""Questions whose answers are shown, at most."""


@dataclass(frozen=True)
class Report:
    """Runs read once, for the page and the terminal."""

    entries: Sequence[Entry]
    sections: Sequence[Section]
    folder: Path
    """The folder that holds all runs."""
    baseline: str | None = None
    """Name of the method that others are measured against, where it was given."""

    @classmethod
    def of(cls, paths: Sequence[str | Path], baseline: str | None = None) -> Report:
        """The report of the runs among these paths and in the folders among them.

        Args:
            baseline: name of the method that others are measured against.

        Raises:
            ConfigError: a path holds no run, or no method has the name.
            CheckpointError: they cannot be compared, and no single one of them is to blame.
        """
        found = find(paths)
        inside = len(paths) == 1 and found != [user_path(paths[0])]
        folder = user_path(paths[0]).absolute() if inside else common_folder(found)
        entries = read_all(found, folder, Defaults())
        try:
            return cls._made(entries, baseline, folder)
        except CheckpointError as error:
            return cls._made(_drawable(entries, error), baseline, folder)

    @classmethod
    def _made(cls, entries: Sequence[Entry], baseline: str | None, folder: Path) -> Report:
        with drawn_from(folder):
            return cls(entries, sections(entries, baseline), folder, baseline)

    def sound(self) -> Report:
        """This report, or where a run holds what cannot be drawn, one of the others that lists it as damaged.

        Raises:
            CheckpointError: no single run is to blame.
        """
        try:
            self.content  # noqa: B018  # drawn now, and kept
        except CheckpointError as error:
            return Report._made(_drawable(self.entries, error), self.baseline, self.folder).sound()
        return self

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """What stands on the page.

        Raises:
            CheckpointError: a run holds what cannot be drawn.
        """
        with drawn_from(self.folder):
            return {
                "title": self.folder.name,
                "summary": self.summary(),
                "sections": [_shown(section) for section in self.sections],
                "left_out": [(entry.name, status_of(entry), entry.error or "") for entry in self.left_out],
                "runs": [_run_row(entry) for entry in self.entries],
            }

    @property
    def left_out(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.counts]

    @property
    def damaged(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == DAMAGED]

    def summary(self) -> list[str]:
        """What is to be known before any figure."""
        counted = "1 run" if len(self.entries) == 1 else f"{len(self.entries):,} runs"
        texts = [f"{counted} in {self.folder.name}: {named_in_words(self.entries)}."]
        if len(self.sections) > 1:
            texts.append(
                f"The runs saw {len(self.sections)} different sets of samples. Those of one set stand in a section of "
                "their own, and nothing is compared across sections."
            )
        if any(not entry.chose for entry in self.left_out):
            texts.append(
                "Runs that did not finish, or diverged, are part of no mean; they are listed at the end with what "
                "became of them."
            )
        if any(entry.chose for entry in self.entries):
            texts.append(
                "Runs of seeds that chose a learning rate are part of no mean: they would flatter their method."
            )
        return texts

    def write(self, page: str | Path | None = None) -> Path:
        """Write the page, and return its path: ``runs.html`` in the folder that holds all runs, or ``page``.

        Raises:
            ConfigError: ``page`` is a folder, or lies in none.
            CheckpointError: it could not be written, or not be drawn, as :meth:`sound` says.
        """
        path = self.folder / PAGE if page is None else user_path(page)
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "is a folder" if path.is_dir() else "lies in no folder that is there"
            raise ConfigError(f"The page {str(path)!r} cannot be written: it {what}. Name a file.")
        if path.is_file() and not path.read_bytes()[:64].lstrip().lower().startswith(b"<!doctype html"):
            raise ConfigError(f"{str(path)!r} is there already and is no page, so it is not overwritten. Name a file.")
        with drawn_from(self.folder):
            return write_page(path, "runs.html", **self.sound().content)


def _drawable(entries: Sequence[Entry], error: CheckpointError) -> list[Entry]:
    """The runs, of which those that cannot be drawn by themselves are damaged; raises the error where all can be."""
    found = [_drawn_alone(entry) for entry in entries]
    if all(one is entry for one, entry in zip(found, entries, strict=True)):
        raise error
    return found


def _drawn_alone(entry: Entry) -> Entry:
    try:
        Report._made([entry], None, entry.path).content  # noqa: B018
    except CheckpointError as error:
        return replace(entry, status=DAMAGED, error=str(error), result={}, metrics=[], environment={})
    return entry


def status_of(entry: Entry) -> str:
    return f"{entry.status}, chose the rate" if entry.chose else entry.status


def title_of(section: Section) -> str:
    """What a section's runs learn from, and by which samples they are known."""
    first = section.runs[0].result
    rows = first.get("rows") or {}
    counted = f": {rows['train']:,} rows trained on, {rows['heldout']:,} held out" if rows else ""
    digest = f"samples {section.samples:.12}" if section.samples else "no digest of the samples is recorded"
    return f"{first.get('source') or 'Runs'}{counted} ({digest})"


def table_of(section: Section) -> tuple[list[str], list[list[str]]]:
    """Headings and one row a method, with the columns that any of them has something for."""
    columns: dict[str, list[str]] = {}
    for heading, measure, form in _measures(section):
        cells = [_interval(method, measure, form) for method in section.methods]
        if any(cell != MISSING for cell in cells):
            columns[heading] = cells
            differences = section.differences(measure)
            if differences:
                against = [differences.get(method.name) for method in section.methods]
                shown = [MISSING if found is None else _formed(found, form, "+") for found in against]
                columns[f"{heading}, difference"] = shown
    times = [method.seconds_a_step for method in section.methods]
    own: dict[str, list[str]] = {
        "s / step": [in_spread(each) if each else MISSING for each in times],
        "peak memory": [_size(method.peak("peak_rss_bytes")) for method in section.methods],
        "of the accelerator": [_size(method.peak("peak_device_bytes")) for method in section.methods],
        "trained": [MISSING if m.trainable is None else f"{m.trainable:,}" for m in section.methods],
        "rows dropped / cut": [_rows_left_out(method) for method in section.methods],
        "answers cut": [_cut(method) for method in section.methods],
        "step kept": [_kept(method) for method in section.methods],
    }
    columns |= {name: cells for name, cells in own.items() if any(cell != MISSING for cell in cells)}
    base = section.baseline if len(section.methods) > 1 else None
    names = [f"{method.name} (baseline)" if method is base else method.name for method in section.methods]
    runs = [str(len(method.runs)) for method in section.methods]
    return ["method", "runs", *columns], [list(row) for row in zip(names, runs, *columns.values(), strict=True)]


def notes_of(section: Section) -> list[str]:
    """How the figures of a section's table were made."""
    texts = [
        "Figures are means over seeds ± half of their 95 % interval (Student's t); a single run has none, but its "
        "accuracy may have one over its questions."
    ]
    compared = len(section.differences(loss)) or len(section.differences(accuracy))
    if compared:
        corrected = (
            f", with intervals that are corrected for {compared} comparisons (Bonferroni): with 95 % those of a column "
            "all hold at once"
            if compared > 1
            else ""
        )
        texts.append(f"Differences are to {section.baseline.name}, seed by seed{corrected}.")
    texts.append(
        "Seconds a step are medians, with the times a tenth of the steps lies below and above; measuring is left out."
    )
    if any(run.result.get("peak_rss_bytes") and run.result.get("peak_rss_of") != "run" for run in section.runs):
        texts.append("Peaks that may be those of a process with more than one run in it are left out.")
    if any(run.result.get("kept_step") is not None for run in section.runs):
        texts.append("Where a step was kept, it was chosen on rows that are reported, which flatters the loss.")
    if len(section.methods) > 2:
        texts.append(
            "The best of many figures is better than it would be again: choose by some seeds, and report others."
        )
    if section.samples is None:
        texts.append("These runs recorded no digest of their samples, so nothing shows that they saw the same.")
    return texts


def _measures(section: Section) -> list[tuple[str, Any, str]]:
    others = dict.fromkeys(name for run in section.runs for name in run.measures if name not in SHOWN)
    named = [(name.replace("_", " "), (lambda run, name=name: run.scores.get(name)), ".4g") for name in others]
    return [("held-out loss", loss, ".4f"), ("accuracy", accuracy, ".1%"), *named]


def _interval(method: Method, measure: Any, form: str) -> str:
    found = method.interval(measure)
    bounds = (method.runs[0].result.get("after") or {}).get("interval")
    if measure is accuracy and len(method.runs) == 1 and found and bounds:
        return f"{found['mean']:{form}} ({bounds[0]:{form}} to {bounds[1]:{form}})"
    return _formed(found, form) if found else MISSING


def _formed(found: Mapping[str, Any], form: str, sign: str = "") -> str:
    return plus_minus(found, sign=sign, form=form)


def _size(size: int | None) -> str:
    return MISSING if size is None else gib(size)


def _rows_left_out(method: Method) -> str:
    rows = method.runs[0].result.get("rows") or {}
    return f"{rows['dropped']:,} / {rows['truncated']:,}" if rows else MISSING


def _cut(method: Method) -> str:
    """How many answers were still going on where they had to end, over all runs."""
    cut, total = (sum(int(run.scores.get(name, 0)) for run in method.runs) for name in ("cut", "total"))
    if not cut:
        return MISSING
    return f"{cut:,} of {total:,}" if total else f"{cut:,}"


def _kept(method: Method) -> str:
    steps = [run.result.get("kept_step") for run in method.runs]
    return ", ".join(f"{step:,}" for step in steps if step is not None) or MISSING


# ---- the page -------------------------------------------------------------------------------------------------------


def _shown(section: Section) -> dict[str, Any]:
    headings, rows = table_of(section)
    shown = [[marked(method.style, row[0]), *row[1:]] for method, row in zip(section.methods, rows, strict=True)]
    varying = section.varying()
    changed = section.methods[0].runs[0].changed
    shared = {name: value for name, value in changed.items() if name not in (*varying, *OF_THE_PLACE)}
    return {
        "title": title_of(section),
        "headings": headings,
        "rows": shown,
        "notes": notes_of(section),
        "drawings": drawings(section),
        "coverage": _coverage(section),
        "ranks": [
            (method.name, *row)
            for method in section.methods
            for row in rank_rows(method.runs[0].result.get("start") or {})
        ],
        "answers": _answers(section),
        "varying": _varying(section, varying) if varying else None,
        "shared": "\n".join(f"{name}={written(value)}" for name, value in shared.items()),
    }


def _coverage(section: Section) -> list[tuple[str, ...]]:
    """One row a kind of module that is adapted or trained; methods that cover the same stand together."""
    together: dict[str, list[str]] = {}
    for method in section.methods:
        if covered := method.runs[0].result.get("coverage"):
            together.setdefault(json.dumps(covered), []).append(method.name)
    rows: list[tuple[str, ...]] = []
    for covered, names in together.items():
        kinds = json.loads(covered)
        whole = sum(kind["base"] for kind in kinds)
        rows += [
            (
                "all" if len(names) == len(section.methods) else shorten(names, 3),
                str(kind["name"]),
                str(kind["kind"]),
                f"{kind['matched']}/{kind['modules']}",
                f"{kind['base']:,} ({kind['base'] / max(whole, 1):.1%})",
                f"{kind['trainable']:,}",
            )
            for kind in kinds
            if kind["matched"] or kind["trainable"]
        ]
    return rows


def _answers(section: Section) -> list[dict[str, Any]]:
    """The first questions of the section, with the answers before the training and of every method after it."""
    found: dict[str, dict[str, Any]] = {}
    for method in section.methods:
        for sample in method.runs[0].result.get("samples") or []:
            entry = found.setdefault(
                sample["question"],
                {"text": sample["question"], "gold": sample["gold"], "given": [("", "before", sample["before"])]},
            )
            entry["given"].append((swatch(method.style), method.name, sample["after"]))
    return list(found.values())[:ANSWERS]


def _varying(section: Section, names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    rows: list[list[Any]] = []
    for method in section.methods:
        settings = method.runs[0].settings
        cells = [written(settings[name]) if name in settings else MISSING for name in names]
        rows.append([marked(method.style, method.name), *cells])
    return ["method", *names], rows


def _run_row(entry: Entry) -> tuple[Any, ...]:
    seconds = (entry.result.get("seconds") or {}).get("total")
    command = shlex.join(entry.environment.get("command") or [])
    return (
        entry.name,
        status_of(entry),
        MISSING if entry.seed is None else str(entry.seed),
        MISSING if seconds is None else duration(seconds),
        Markup("<code>{}</code>").format(command) if command else MISSING,
    )
