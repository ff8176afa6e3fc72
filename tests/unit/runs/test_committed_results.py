"""Runs that were made with earlier versions can be read, as what they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.runs import CONFIG
from lorafa.runs.formats import current
from lorafa.runs.record import RunDirectory
from lorafa.settings.typed import build, plain
from lorafa.train.settings.run import RunConfig
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
def test_a_committed_run_is_read_as_what_it_was(run: Path) -> None:
    written: dict[str, Any] = yaml.safe_load((run / CONFIG).read_text())
    read = plain(RunDirectory.open(run).config())
    for group in ("run_dir", "threads"):
        assert read[group] == written[group]
    for group in ("model", "data", "peft", "init", "optim", "train", "eval"):
        both = read[group].keys() & written[group].keys()
        changed = {key for key in both if read[group][key] != written[group][key]}
        # what the start left to its method is written out today, and a bound that bounds nothing is not
        assert all(written[group][key] is None for key in changed - {"r_min"}), changed
        assert "r_min" not in changed or (written["init"]["r_min"], written["init"]["ranks"]) == (1, None)


def old(**groups: dict[str, Any]) -> dict[str, Any]:
    """config.yaml of a run of the first version, with the settings of all entries of a group side by side."""
    init: dict[str, Any] = dict.fromkeys(
        (
            *("direction", "scale", "stable_gamma", "normalize", "step", "rho", "tau", "whiten", "corda_method"),
            *("loftq_bits", "loftq_iter", "exact", "pivoted", "ranks", "r_max"),
        )
    )
    values = {
        "data": {"name": "rows.jsonl", "subset": None, "split": "train", "revision": None, "templates": None},
        "init": init | {"mode": "default", "bsz": 1, "iters": 8, "max_length": 1024, "passes": 1, "r_min": 1},
        "optim": {"name": "sgd", "lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "algorithm": "exact", "lr_ratio": 16.0,
                  "reg": 0.01, "damping": "relative", "prec_reg": 1e-6, "form": "adamw", "X": "sylvester"},
        "train": {"steps": 5},
    }  # fmt: skip
    return {group: value | groups.get(group, {}) for group, value in values.items()}


def test_settings_that_an_earlier_version_wrote_down_unread_are_left_out() -> None:
    config = build(RunConfig, current(old()))
    assert (config.optim.name, config.optim.lr, config.optim.own) == ("sgd", 0.1, None)
    assert (config.init.r_min, config.data.own.prompt_column) == (None, None)


def test_settings_that_it_read_are_kept() -> None:
    optim = {"name": "lora_fa", "algorithm": "fold", "eps": 1e-6, "betas": [0.8, 0.9]}
    init = {"mode": "lora_ga", "scale": "gd", "direction": "ArBr", "iters": 64}
    data = {"name": "owner/name", "subset": "main", "split": "test"}
    config = build(RunConfig, current(old(optim=optim, init=init, data=data)))
    assert (config.optim.own.algorithm, config.optim.own.eps, config.optim.own.betas) == ("fold", 1e-6, (0.8, 0.9))
    assert (config.init.own.scale, config.init.own.direction, config.init.iters) == ("gd_scale", "ArBr", 64)
    assert (config.data.own.subset, config.data.own.split) == ("main", "test")
    assert build(RunConfig, current(old(init={"mode": "eva", "rho": 1.0}))).init.own.rho == 1.0


@pytest.mark.parametrize(
    ("group", "values", "text"),
    [
        ("optim", {"algorithm": "fold"}, r"'optim\.algorithm' for optim=sgd \(found 'fold'\)"),
        ("init", {"rho": 2.0}, r"'init\.rho' for init=default \(found 2\.0\)"),
        ("optim", {"speed": 1}, r"'optim\.speed' for optim=sgd"),
    ],
)
def test_what_it_would_have_refused_is_refused(group: str, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(RunConfig, current(old(**{group: values})))


@pytest.mark.parametrize(
    "overrides",
    ["", "optim=lora_fa", "optim=sgd", "init=eva", "init=gradient", "data=a/b", "init.ranks=budget init.r_min=1"],
)
def test_todays_settings_are_read_as_they_are(overrides: str) -> None:
    config = compose(overrides.split())
    assert build(RunConfig, current(yaml.safe_load(yaml.safe_dump(plain(config))))) == config
