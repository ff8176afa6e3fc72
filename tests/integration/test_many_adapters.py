"""A hundred adapters on one model: adding the last takes as many steps as adding the third."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.language_models import llama

COUNT = 100


def calls(run: Callable[[], Any]) -> int:
    """How many functions of Python are called."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_adding_an_adapter_takes_no_more_steps_beside_a_hundred(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    loading = [calls(lambda: model.load_adapter(tmp_path, f"a{i}")) for i in range(COUNT)]  # noqa: B023
    assert loading[-1] < 1.02 * loading[2]
    adding = calls(lambda: model.add_adapter("new", config))
    few = get_peft_model(llama(), config)
    few.add_adapter("second", config)
    assert adding < 1.02 * calls(lambda: few.add_adapter("third", config))


def test_choosing_an_adapter_calls_nothing_for_those_that_are_frozen(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    few = calls(lambda: model.set_adapter("default"))
    for i in range(20):
        model.add_adapter(f"a{i}", config)
    assert calls(lambda: model.set_adapter("default")) < 1.02 * few
