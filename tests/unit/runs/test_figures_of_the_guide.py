"""The figures of docs/how-to-choose.md are those of the comparisons they name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

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
