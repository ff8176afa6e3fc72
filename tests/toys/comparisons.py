"""Comparisons whose runs are over at once: a plan, and what stands in for a training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from rich.console import Console

from lorafa.conf.compose import compose
from lorafa.errors import DivergedError
from lorafa.runs.comparison import compare
from lorafa.runs.plan import Plan
from lorafa.settings.typed import plain
from lorafa.train.settings.run import RunConfig

PLAN: dict[str, Any] = {
    "baseline": "lora",
    "seeds": [0, 1, 2],
    "settings": ["train.steps=20"],
    "methods": {
        "lora": {"settings": ["optim=adamw"], "rates": [1e-3, 2e-3, 4e-3]},
        "fa": {"settings": ["optim=lora_fa"], "rates": [1e-3, 2e-3]},
    },
}

BEST = {"adamw": 2e-3, "lora_fa": 1e-3}
"""Best rates that lie inside the grids, or grow them by one rate."""


def plan_file(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


@cache
def composed(*overrides: str) -> RunConfig:
    return compose(overrides)


def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings are composed once: it takes a tenth of a second, and a comparison does it for every run, each
    time it is made."""

    def compose_but_for_the_place(overrides: Sequence[str]) -> RunConfig:
        values = [text for text in overrides if not text.startswith("run_dir=")]
        places = [text.removeprefix("run_dir=") for text in overrides if text.startswith("run_dir=")]
        return replace(composed(*values), **({"run_dir": places[-1]} if places else {}))

    for module in ("comparison", "plan"):
        monkeypatch.setattr(f"lorafa.runs.{module}.compose", compose_but_for_the_place)


class Fake:
    """Runs whose final loss is the squared distance of log2(rate) from the method's best rate, plus the seed.

    Args:
        diverges_above: a learning rate.
        ends: what comes of a run instead, by "method/run": another loss, or an error.
    """

    def __init__(
        self,
        best: dict[str, float],
        fail_after: int = 10**6,
        diverges_above: float = math.inf,
        ends: Mapping[str, float | Exception] = MappingProxyType({}),
    ) -> None:
        self.best, self.fail_after, self.diverges_above, self.ends = best, fail_after, diverges_above, ends
        self.started: list[str] = []
        self.expected: list[str | None] = []
        self.samples: str | None = "a" * 64

    def __call__(
        self, config: RunConfig, console: Console, command: Sequence[str], samples: str | None = None
    ) -> Path:
        path = Path(str(config.run_dir))
        self.expected.append(samples)
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(plain(config)))
        if len(self.started) == self.fail_after:
            raise KeyboardInterrupt
        name = f"{path.parent.name}/{path.name}"
        self.started.append(name)
        loss = math.log2(config.optim.lr / self.best[config.optim.name]) ** 2 + 0.1 * config.train.seed
        curve = [{"step": s, "loss": 9.0, "eval_loss": loss + 1 - s / 20, "seconds": 0.5 * s} for s in (10, 20)]
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, curve)))
        if config.optim.lr > self.diverges_above:
            raise DivergedError("The loss is nan in step 3.")
        end = self.ends.get(name, loss)
        if isinstance(end, Exception):
            raise end
        result = {"status": "finished", "after": {"loss": end}, "parameters": {"trainable": 7, "all": 9}}
        result |= {"steps": 20, "seconds": {"train": 10.0}, "samples_sha256": self.samples}
        (path / "result.json").write_text(json.dumps(result))
        return path


def run(folder: Path, fake: Fake, **changes: Any) -> dict[str, dict[str, Any]]:
    console = Console(quiet=True)
    return {row["method"]: row for row in compare(Plan.read(plan_file(folder, **changes)), folder, console, start=fake)}
