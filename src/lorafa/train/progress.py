"""What a training says while it runs: a bar on the terminal, a line of metrics for the record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

METRIC_NAMES = {
    "loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "eval_loss": "eval_loss",
    "divergence": "divergence",
}  # fmt: skip
"""What the trainer logs -> its name in metrics.jsonl."""


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Callable[..., None]]:
    """A bar while the block runs; gives ``update(done, total, note="")``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the bar with every step and hands every logged step to ``record`` as one flat row.

    Args:
        record: takes a row: step, epoch, tokens (read so far, padding left out), seconds (since the training began,
            over all its parts), and of ``METRIC_NAMES`` what was logged.
        bar: ``update(done, total, note)``.
        seconds_before: length of the part of this training that ran before it was continued.
        own: what else is logged -> its name in a row; measured on held-out rows, both begin with ``eval_``.
    """

    def __init__(
        self,
        record: Callable[[Mapping[str, Any]], None],
        bar: Callable[..., None],
        seconds_before: float = 0.0,
        own: Mapping[str, str] | None = None,
    ) -> None:
        self.record = record
        self.bar = bar
        self.seconds_before = seconds_before
        self.note = ""
        own = dict(own or {})
        self.names = METRIC_NAMES | own | {f"eval_{key}": f"eval_{name}" for key, name in own.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar(state.global_step, state.max_steps, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        values = {name: logs[key] for key, name in self.names.items() if logs and key in logs}
        if not {"loss", "eval_loss"} & values.keys():
            return  # the summary at the end of the training, not a step
        if "loss" in values:
            self.note = f"loss {values['loss']:.3f}"
        seconds = self.seconds_before + time.monotonic() - self.began
        self.record(
            {
                "step": state.global_step,
                "epoch": round(float(state.epoch or 0), 4),
                **values,
                "tokens": int(state.num_input_tokens_seen),
                "seconds": round(seconds, 3),
            }
        )
