"""One run from its settings to its directory: prepare, record where it happens, train, record how it ended."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from lorafa.errors import CheckpointError, ConfigError
from lorafa.runs.environment import environment, peak_rss_bytes
from lorafa.runs.record import RunDirectory
from lorafa.train.recipe import prepare, train
from lorafa.train.settings.run import RunConfig


def start_run(config: RunConfig, console: Console, command: Sequence[str]) -> Path:
    """Train as ``config`` says and return the new run directory.

    The directory is this run's from the start, whoever else starts now. Something is written into it once model, data
    and adapter stand; what fails before, a setting that does not fit, leaves nothing behind.

    Raises:
        LoraError: of the kind that fits; from the training on, result.json says what happened.
    """
    with RunDirectory.claimed(config) as run:
        return _run(run.path, None, config, console, command)


def resume_run(path: str | Path, console: Console, command: Sequence[str]) -> Path:
    """Continue a run from its last checkpoint, with its own settings, and return its directory.

    Raises:
        LoraError: as :func:`resumable`, or another process is at the run; from the training on, result.json says what
            happened.
    """
    with RunDirectory.open(path).held():
        run, checkpoint = resumable(path)
        return _run(run.path, checkpoint, run.config(), console, command)


def resumable(path: str | Path) -> tuple[RunDirectory, Path]:
    """The run in a directory and the checkpoint it can be continued from.

    Raises:
        ConfigError: not a run directory, or the run is finished.
        CheckpointError: the run has no checkpoint.
    """
    run = RunDirectory.open(path)
    if run.result().get("status") == "finished":
        raise ConfigError(f"The run {str(run.path)!r} is finished; there is nothing to continue. Start a new run.")
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        raise CheckpointError(
            f"The run {str(run.path)!r} has no checkpoint to continue from (train.checkpoint_every is "
            f"{run.config().train.checkpoint_every}). Start a new run."
        )
    return run, checkpoint


def _run(path: Path, checkpoint: Path | None, config: RunConfig, console: Console, command: Sequence[str]) -> Path:
    started = time.monotonic()
    with _threads(config.threads):
        prepared = prepare(config, console)
        run = RunDirectory(path) if checkpoint else RunDirectory.create(path, config)
        if checkpoint:
            run.drop_metrics_after(int(checkpoint.name.rpartition("-")[2]))
        run.write_environment(environment(command))
        run.update_result(status="running", error=None)
        console.print(f"Run directory: {run.path}", highlight=False, markup=False, soft_wrap=True)
        try:
            train(prepared, config, run, console, checkpoint)
        except KeyboardInterrupt:
            run.update_result(status="failed", error="interrupted")
            _say_how_to_continue(run, console)
            raise
        except BaseException as error:
            run.update_result(status="failed", error=f"{type(error).__name__}: {error}")
            raise
        seconds = {**run.result().get("seconds", {}), "total": round(time.monotonic() - started, 1)}
        run.update_result(status="finished", seconds=seconds, peak_rss_bytes=peak_rss_bytes(), error=None)
    return run.path


def _say_how_to_continue(run: RunDirectory, console: Console) -> None:
    found = run.last_checkpoint()
    text = (
        f"Continue from {found.name} with: lorafa train {shlex.quote(f'train.resume={run.path}')}"
        if found
        else "There is no checkpoint yet to continue from (train.checkpoint_every)."
    )
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """PyTorch with that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
