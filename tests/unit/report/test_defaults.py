"""Which settings of a run are not the default ones."""

from __future__ import annotations

from typing import Any

import pytest

from lorafa.conf.compose import compose
from lorafa.report.defaults import Defaults
from lorafa.report.values import flat, written
from lorafa.settings.typed import plain


@pytest.fixture(scope="module")
def defaults() -> Defaults:
    return Defaults()


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["run_dir=x", "threads=3"], {}),
        (["optim=lora_fa"], {"optim.name": "lora_fa"}),
        (["optim=lora_fa", "optim.algorithm=fold"], {"optim.name": "lora_fa", "optim.algorithm": "fold"}),
        (["data=rows.jsonl", "optim.lr=1e-4"], {"data.name": "rows.jsonl", "optim.lr": 1e-4}),
        (["data.train_size=7", "train.seed=3"], {"data.train_size": 7, "train.seed": 3}),
        (["init=pissa", "peft.lora_dropout=0.05"], {"init.mode": "pissa", "peft.lora_dropout": 0.05}),
        (["optim.schedule=constant", "optim.warmup=0"], {"optim.schedule": "constant", "optim.warmup": 0.0}),
    ],
)
def test_what_was_not_asked_for_is_default(words: list[str], changed: dict[str, Any], defaults: Defaults) -> None:
    assert defaults.changed(flat(plain(compose(words)))) == changed


def test_nested_settings_have_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_values_are_written_as_on_the_command_line() -> None:
    values = [None, True, [1, "q_proj"], 0.001, "x"]
    assert [written(value) for value in values] == ["null", "true", "[1,q_proj]", "0.001", "x"]
