"""The arguments of the inference benchmark are checked before a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from toys.places import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def read_arguments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "bench_inference", raising=False)
    import bench_inference

    return bench_inference.read_arguments  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "x", ""])
@pytest.mark.parametrize("option", ["rows", "length", "tokens", "repeats", "threads"])
def test_what_is_counted_is_at_least_one(read_arguments: Any, capsys: Any, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        read_arguments([f"--{option}={value}"])
    assert stop.value.code == 2
    assert f"argument --{option}: must be an integer >= 1, found {value!r}" in capsys.readouterr().err


def test_prompt_and_tokens_must_fit_the_model(read_arguments: Any, capsys: Any) -> None:
    assert read_arguments(["--length=8000", "--tokens=192"]).length == 8000
    with pytest.raises(SystemExit) as stop:
        read_arguments(["--length=8000", "--tokens=193"])
    assert stop.value.code == 2
    assert "--length and --tokens together are 8193 positions, the model has 8192" in capsys.readouterr().err
