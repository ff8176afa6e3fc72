"""Plans of comparisons: what they may say, and that a mistake shows before the first run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafa.errors import ConfigError
from lorafa.runs.plan import Plan
from toys.comparisons import compose_once, plan_file
from toys.places import ROOT


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    compose_once(monkeypatch)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"baseline": "dora"}, r"baseline 'dora' is none of fa, lora"),
        ({"methods": {"lora": {"settings": [], "rates": []}}}, r"lora must hold settings and rates"),
        ({"methods": {"lora": {"settings": [], "rates": [2e-3, 1e-3]}}}, r"numbers > 0, rising"),
        ({"methods": {"a/../b": {"settings": [], "rates": [1e-3]}}, "baseline": "a/../b"}, r"cannot name a folder"),
        ({"more": 1}, r"must hold baseline, methods, seeds, settings \(and may hold choose\), found"),
        ({"choose": [2, 7]}, r"seeds that choose a rate are not reported, found 2 in choose and in seeds\. Name"),
        ({"choose": "0"}, r"choose must be a list of different integers, found '0'"),
        (
            {"choose": [5], "methods": {"lora": {"settings": [], "rates": [1e-3]}}},
            r"choose names seeds, but no method has several rates to choose from\. Leave it out",
        ),
        ({"settings": ["peft.rank=3"]}, r"peft.rank"),
        ({"methods": {"lora": {"settings": [], "rates": ["1e-3"]}}}, r"Numbers are written with a point: 1\.0e-3"),
        ({"settings": 3}, r"settings must be a list of settings, found 3\. Write \[train\.steps=100\]"),
        (
            {"settings": ["+optim.lr=3"]},
            r"sets '\+optim\.lr=3', but optim\.lr is the comparison's: see rates\. Leave it",
        ),
        ({"settings": ["run_dir=x"]}, r"run_dir is the comparison's: every run has its own"),
        (
            {"methods": {"lora": {"settings": "optim=sgd", "rates": [1e-3]}}},
            r"lora must be a list of settings, found 'optim=sgd'",
        ),
        *(
            ({"seeds": seeds}, r"seeds must be a list of different integers, found .* Write \[0, 1, 2\]")
            for seeds in (0, [], ["a"], [1, 1])
        ),
    ],
)
def test_a_plan_that_is_none_is_refused_before_the_first_run(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        Plan.read(plan_file(tmp_path, **changes))


def test_what_a_comparison_sets_itself_cannot_be_set_for_all_its_runs(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the command: key=value sets 'train\.seed=3', but train\.seed is the compar"
    ):
        Plan.read(plan_file(tmp_path), ["threads=2", "train.seed=3"])


@pytest.mark.slow  # test_documents reads those that a document names
@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_plan(path: Path) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["methods"]
    assert [method.name for method in Plan.read(path).methods] == list(written)
    assert len(written) > 1
