"""The table of packages is that of pyproject.toml, and what is said of one is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorafa.diagnosis import CHECKS, ORDER
from lorafa.diagnosis.features import FEATURES, QUANTIZED, WRITTEN_BY, jobs
from lorafa.diagnosis.jobs import JOBS
from lorafa.diagnosis.packages import BY_NAME, PACKAGES
from lorafa.export import EXPORTERS
from lorafa.models import QUANTIZERS
from lorafa.train.trackers import TRACKERS
from toys.places import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def requirements(heading: str) -> dict[str, str]:
    """A list of pyproject.toml: name -> range; other extras in it have none."""
    lines = re.search(rf"^{heading} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
    return {name.lower(): ends for name, ends in re.findall(r'"([\w.-]+)([^" ;]*)', lines)}


def claimed(extra: str | None) -> dict[str, str]:
    """What the table says of an extra, as pip would be told."""
    return {
        package.name: package.requirement.strip("'").removeprefix(package.name)
        for package in PACKAGES
        if package.extra == extra
    }


@pytest.mark.parametrize(("heading", "extra"), [("dependencies", ""), ("train", "train")])
def test_ranges_are_those_of_pyproject(heading: str, extra: str) -> None:
    assert claimed(extra) == requirements(heading)


def test_ranges_of_what_is_optional_are_those_it_is_tested_with() -> None:
    tested = {name: ends.replace("==", ">=") for name, ends in requirements("dev").items()} | requirements("trl")
    optional = {name: ends for name, ends in claimed(None).items() if ends}
    assert optional.items() <= tested.items()
    assert optional.keys() >= {"bitsandbytes", "torchao", "trl", "peft"}


def test_every_feature_names_a_package_and_a_trial_that_are_there() -> None:
    assert {feature.package for feature in FEATURES if feature.package} <= BY_NAME.keys()
    for job in [feature.job for feature in FEATURES if feature.job] + jobs():
        assert job.partition(":")[0] in JOBS
    assert len(jobs()) == len(set(jobs()))


def test_every_way_to_quantize_target_of_an_export_and_tracker_is_among_the_features() -> None:
    named = {feature.name for feature in FEATURES}
    assert {f"model.quantize={name}" for name in QUANTIZERS.names()} <= named
    assert {f"lorafa export --for {name}" for name in EXPORTERS.names()} <= named
    assert {f"report_to={name}" for name in TRACKERS.names()} <= named


def test_what_a_tracker_needs_is_what_the_table_says() -> None:
    needed = {f"report_to={name}": TRACKERS.get(name).package for name in TRACKERS.names()}
    assert {feature.name: feature.package for feature in FEATURES if feature.name in needed} == needed


@pytest.mark.parametrize("way", sorted({*QUANTIZED}))
def test_a_way_to_quantize_that_needs_a_package_imports_it(way: str) -> None:
    assert QUANTIZED.keys() <= set(QUANTIZERS.names())
    place = str(QUANTIZERS.place(way) or QUANTIZERS.get(way).__module__).partition(":")[0]
    text = (ROOT / "src" / Path(*place.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert re.search(rf"^\s*(import|from) {QUANTIZED[way]}\b", text, re.MULTILINE)


def test_targets_of_an_export_that_need_a_package_are_targets() -> None:
    assert WRITTEN_BY.keys() <= set(EXPORTERS.names())


def test_all_checks_are_made() -> None:
    assert sorted(ORDER) == CHECKS.names()
