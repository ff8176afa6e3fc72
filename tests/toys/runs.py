"""Run directories as trainings leave them, made without any training."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lorafa.conf.compose import compose
from lorafa.settings.typed import plain

SAMPLES = "5" * 64
RATE, SEED, RANK = "0.00123", "98765", "4321"
"""Stand in the settings for what varies."""


@cache
def settings_text() -> str:
    config = compose(["data=rows.jsonl", f"optim.lr={RATE}", f"train.seed={SEED}", f"peft.r={RANK}"])
    return yaml.safe_dump(plain(config), sort_keys=False)


def metrics_rows(steps: int, loss: float, rate: float) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        at = loss + math.exp(-step / 20) + 0.02 * math.sin(step)
        row = {"step": step, "loss": at, "lr": rate * (1 - step / steps), "grad_norm": 1 / step}
        rows.append(row | {"tokens": 100 * step, "seconds": 0.5 * step})
        if step % 20 == 0:
            rows.append({"step": step, "eval_loss": at + 0.05, "tokens": 100 * step, "seconds": 0.5 * step})
    return rows


def make_run(
    path: Path, *, loss: float, rate: float = 1e-3, rank: int = 8, seed: int = 0, steps: int = 40, **result: Any
) -> Path:
    """A finished run; entries of result.json replace those that are usual, and None takes one out."""
    path.mkdir(parents=True)
    text = settings_text().replace(RATE, repr(rate)).replace(SEED, str(seed)).replace(RANK, str(rank))
    (path / "config.yaml").write_text(text)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics_rows(steps, loss, rate)))
    found: dict[str, Any] = {
        "status": "finished", "error": None, "source": "rows.jsonl", "samples_sha256": SAMPLES, "steps": steps,
        "rows": {"train": 20, "heldout": 4, "repeated": 0, "dropped": 46, "truncated": 1},
        "before": {"loss": loss + 1, "accuracy": 0.0, "correct": 0, "total": 4, "unparsed": 4},
        "after": {"loss": loss, "accuracy": 0.5 - loss / 10, "correct": 2, "total": 4, "unparsed": 0},
        "parameters": {"trainable": 1000 * rank, "all": 10**6}, "seconds": {"train": 20.0, "total": 75.2},
        "peak_rss_bytes": (500 + rank) * 2**20, "peak_rss_of": "run", "peak_device_bytes": None,
    }  # fmt: skip
    found = {name: value for name, value in (found | result).items() if value is not None}
    (path / "result.json").write_text(json.dumps(found))
    command = ["lorafa", "train", "data=my rows.jsonl", f"optim.lr={rate!r}", f"train.seed={seed}"]
    (path / "environment.json").write_text(json.dumps({"command": command}))
    return path
