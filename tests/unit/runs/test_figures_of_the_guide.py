"""The figures of docs/how-to-choose.md are those of the comparisons they name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lorafa.runs.measures import heldout_curve, steps_to_baseline
from lorafa.runs.record import RunDirectory
from toys.places import ROOT

PAGE = (ROOT / "docs" / "how-to-choose.md").read_text(encoding="utf-8")
RUNS = r"\(`results/(\w+)/([\w-]+)`\)"
DIFFERENCES = re.findall(rf"([+-]\d\.\d+ ± \d\.\d+) {RUNS}", PAGE)
RATES = re.findall(rf"(\d[\d.]*e-\d) {RUNS}", PAGE)


def compared(comparison: str, method: str) -> dict[str, Any]:
    folder = ROOT / "docs" / "results" / comparison
    methods = json.loads((folder / "comparison.json").read_text())["methods"]
    assert (folder / method).is_dir()
    return next(row for row in methods if row["method"] == method)


def test_every_named_run_has_a_figure() -> None:
    assert len(re.findall(RUNS, PAGE)) == len(DIFFERENCES) + len(RATES) > 10


@pytest.mark.parametrize(("figure", "comparison", "method"), DIFFERENCES)
def test_a_difference_is_that_of_the_comparison(figure: str, comparison: str, method: str) -> None:
    found = compared(comparison, method)["difference"]
    assert figure == f"{found['mean']:+.3f} ± {found['half_width']:.3f}"


@pytest.mark.parametrize(("figure", "comparison", "method"), RATES)
def test_a_rate_is_the_best_of_the_comparison(figure: str, comparison: str, method: str) -> None:
    assert float(figure) == compared(comparison, method)["lr"]


STARTS = (ROOT / "docs" / "starts.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| (`[^|]*) \|(?:[^|]*\|){5} (\d+|not) \|$", STARTS, flags=re.MULTILINE)
FOLDERS = (
    *("kaiming", "pissa", "olora", "eva", "corda", "lora_ga", "lora_one-128", "lora_one-auto", "functional", "gora"),
    "ranks-kaiming",
)
"""The rows of the table of starts, in its order."""


def curves_of(method: str) -> list[list[tuple[float, float]]]:
    folder, rate = ROOT / "docs" / "results" / "starts" / method, compared("starts", method)["lr"]
    runs = sorted(folder.glob(f"lr-{rate:.4g}-seed-*"))
    assert len(runs) == 3
    return [heldout_curve(RunDirectory(run).metrics()) for run in runs]


@pytest.mark.parametrize(("method", "row"), zip(FOLDERS, STEPS, strict=True), ids=FOLDERS)
def test_the_steps_to_the_baseline_are_those_of_the_one_rule(method: str, row: tuple[str, str]) -> None:
    assert re.split(r"\W+", row[0])[1] in (method.split("-")[0], method.split("-")[-1])
    steps = steps_to_baseline(curves_of(method), curves_of("kaiming"))
    assert row[1] == ("not" if steps is None else f"{steps:.0f}")
