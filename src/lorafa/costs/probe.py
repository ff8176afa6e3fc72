"""A few real steps of a run: what they take of time and memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from lorafa.costs.fits import require_room
from lorafa.train.fit import fit, steps_in_all
from lorafa.train.recipe import prepare
from lorafa.train.sampling import lengths_of
from lorafa.train.settings.run import RunConfig

STEPS = 2
"""The first one has the longest batch, and kernels to make; the second one is timed."""


@dataclass(frozen=True)
class Probe:
    """What was measured."""

    seconds: float
    """How long the last step took."""
    tokens_a_second: float
    """Tokens of the rows, padding apart."""
    training_seconds: float
    """How long the whole training takes at that speed; evaluations apart."""


@dataclass
class _Clock(TrainerCallback):  # type: ignore[misc]
    """Notes how long each step takes and how many tokens it has."""

    steps: list[tuple[float, int]] = field(default_factory=list)
    _began: float = 0.0
    _tokens: int = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._tokens = time.monotonic(), int(state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append((time.monotonic() - self._began, int(state.num_input_tokens_seen) - self._tokens))


def probe(config: RunConfig, console: Console) -> Probe:
    """Load the model and train a few steps; nothing is written, and the adapter is dropped.

    Raises:
        LoraError: as the training would.
    """
    prepared = prepare(config, console, lambda: require_room(config))
    rows = len(prepared.batch_rows)
    train = replace(
        config.train, steps=STEPS, epochs=None, checkpoint_every=0, checkpoint_epochs=None, eval_every=0,
        eval_epochs=None, patience=None, keep_best=False,
    )  # fmt: skip
    short = replace(config, train=train, optim=replace(config.optim, warmup=0.0 if config.optim.warmup else None))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        fit(prepared.material(short), short, Path(folder), [clock], None)
    seconds, tokens = clock.steps[-1]
    lengths = lengths_of(prepared.batch_rows)
    each = sum(lengths) / rows * config.train.batch_size * config.train.accumulation
    speed = tokens / seconds
    return Probe(seconds, speed, steps_in_all(config, rows) * each / speed)
