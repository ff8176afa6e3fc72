"""How often is a config checked, a model walked, and its layers looked for, in each of the ways an adapter is made?

    python benchmarks/bench_calls.py

Calls are counted, not timed, on a model of three linear layers: the figures are exact and the same on every machine.
With another checkout first on PYTHONPATH the same script counts that one.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from harness import emit
from torch import Tensor, nn

import lorafa

NAME = "calls"
SOURCE = str(Path(lorafa.__file__).parent)
COUNTED = {
    "check_config": "checks of a config",
    "find_start": "searches for a start",
    "places": "walks of the model",
    "skeleton": "walks of its wrappers",
    "find_targets": "searches for layers",
    "plan": "plans",
    "fingerprint": "fingerprints",
}


def calls(run: Callable[[], object]) -> dict[str, int]:
    """How often ``run`` enters each of the counted functions; a generator counts once, however often it goes on."""
    entered: dict[int, FrameType] = {}

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name in COUNTED and frame.f_code.co_filename.startswith(SOURCE):
            entered.setdefault(id(frame), frame)  # kept, so that no other frame gets its id

    sys.setprofile(enter)
    try:
        run()
    finally:
        sys.setprofile(None)
    found = Counter(frame.f_code.co_name for frame in entered.values())
    return {label: found[name] for name, label in COUNTED.items()}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))


def loss(adapted: nn.Module, batch: Tensor) -> Tensor:
    return adapted(batch).pow(2).mean()


def config(**fields: Any) -> lorafa.LoraConfig:
    return lorafa.LoraConfig(r=4, target_modules=["0", "1", "2"], **fields)


def main() -> None:
    warnings.simplefilter("ignore")
    rows = list(torch.randn(8, 4, 16))
    plain, lora_one = config(), config(init_lora_weights="lora_one")
    auto = config(init_lora_weights="lora_one", init_config={"stable_gamma": "auto"})
    rule = lorafa.RankRule("budget")
    with tempfile.TemporaryDirectory() as folder:
        lorafa.get_peft_model(model(), plain).save_pretrained(folder)
        ways: dict[str, Callable[[], object]] = {
            "LoraConfig()": config,
            "get_peft_model": lambda: lorafa.get_peft_model(model(), plain),
            "from_pretrained": lambda: lorafa.PeftModel.from_pretrained(model(), folder),
            "initialize": lambda: lorafa.initialize(model(), lora_one, rows, loss=loss),
            "initialize, budget and auto gamma": lambda: lorafa.initialize(
                model(), auto, rows, loss=loss, ranks=rule, halves=True, heldout=rows[:2]
            ),
        }
        for case, run in ways.items():
            run()  # what is imported when it is first used is no part of it
            emit(benchmark=NAME, case=case, **calls(run))


if __name__ == "__main__":
    main()
