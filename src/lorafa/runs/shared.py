"""One run directory for several processes: the first reads and writes it, the others get what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafa.processes import from_main, is_main
from lorafa.runs.record import RunDirectory
from lorafa.train.checkpoints import put_aside_after
from lorafa.train.settings.run import RunConfig


class SharedRun:
    """A run directory as every process of a group has it; a process that is alone has it as it is.

    What reads is to be called by all processes, in the same order: they go on with the same values, whatever the first
    has written meanwhile. What writes does nothing but in the first, and may be called by one alone, when it fails.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self.path = run.path
        self.adapter = run.adapter
        self.model = run.model
        self.merged = run.merged
        self.checkpoints = run.checkpoints

    def config(self) -> RunConfig:
        return from_main(self._run.config)

    def metrics(self) -> list[dict[str, Any]]:
        return from_main(self._run.metrics)

    def result(self) -> dict[str, Any]:
        return from_main(self._run.result)

    def last_checkpoint(self) -> Path | None:
        return from_main(self._run.last_checkpoint)

    def create(self, config: RunConfig) -> None:
        if is_main():
            RunDirectory.create(self.path, config)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        if is_main():
            self._run.add_metrics(row)

    def put_aside_after(self, checkpoint: Path | None) -> None:
        """Clear the place of checkpoints that are passed over."""
        if is_main():
            put_aside_after(self.checkpoints, checkpoint)

    def drop_metrics_after(self, step: int) -> None:
        if is_main():
            self._run.drop_metrics_after(step)

    def write_environment(self, values: Mapping[str, Any]) -> None:
        if is_main():
            self._run.write_environment(values)

    def update_result(self, **entries: Any) -> None:
        if is_main():
            self._run.update_result(**entries)

    def fail(self, error: str) -> None:
        """Record that the run has failed, and of what."""
        self.update_result(status="failed", error=error)
