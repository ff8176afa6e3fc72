"""One run from its settings to its directory: prepare, record where it happens, train, record how it ended."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorafa.costs.fits import require_room
from lorafa.errors import CheckpointError, ConfigError, DataError, LoraError
from lorafa.launch import ending_together
from lorafa.processes import from_main, is_main, on_main
from lorafa.runs import CONFIG
from lorafa.runs.differences import difference, differing
from lorafa.runs.environment import environment
from lorafa.runs.peaks import Peaks
from lorafa.runs.places import with_whole_paths
from lorafa.runs.record import RunDirectory
from lorafa.runs.secrets import refuse_secrets
from lorafa.runs.shared import SharedRun
from lorafa.settings.typed import plain
from lorafa.storage.paths import user_path
from lorafa.storage.whole import read_json
from lorafa.train.checkpoints import STATE_FILE, last_checkpoint, require_same_processes, step_of
from lorafa.train.fit import run_out
from lorafa.train.recipe import prepare, train
from lorafa.train.settings.optim import steps_of, warmup_of
from lorafa.train.settings.run import RunConfig
from lorafa.train.settings.schedules import SCHEDULES
from lorafa.train.settings.trust import require_named, trusting


def start_run(config: RunConfig, console: Console, command: Sequence[str], samples: str | None = None) -> Path:
    """Train as ``config`` says and return the run directory: a new one, or with ``if_exists=resume`` that of a run with
    the same settings, which is continued, or left alone where it is finished.

    A new directory is this run's from the start, whoever else starts now. Something is written into it once model, data
    and adapter stand; what fails before, a setting that does not fit, leaves nothing behind.

    Args:
        samples: SHA-256 of the samples that a new run is to see, those of the runs it will be compared with.

    Raises:
        LoraError: of the kind that fits; from the training on, result.json says what happened.
    """
    refuse_secrets(plain(config))
    if there := from_main(lambda: begun(config)):
        with on_main(there.held()):
            return _go_on(SharedRun(there), config, console, command)
    with on_main(RunDirectory.claimed(config)) as run:
        return _run(SharedRun(run), None, config, console, command, samples)


def begun(config: RunConfig) -> RunDirectory | None:
    """The run that ``if_exists=resume`` continues; None where there is none yet.

    Raises:
        ConfigError: it has other settings.
    """
    path = user_path(config.run_dir) if config.run_dir and config.if_exists == "resume" else None
    if path is None or not os.path.isfile(path / CONFIG):
        return None
    run = RunDirectory.open(path)
    now, then = (with_whole_paths(plain(one)) for one in (config, run.config()))
    if groups := differing(now, then):
        raise ConfigError(
            f"The run {str(path)!r} has other settings, so it is not resumed: "
            f"{difference(groups[0], now[groups[0]], then.get(groups[0]))}. Give it the same, another run_dir, or "
            "if_exists=new."
        )
    return run


def _go_on(run: SharedRun, config: RunConfig, console: Console, command: Sequence[str]) -> Path:
    """Continue from the last checkpoint, or from the start where the run came to none."""
    if run.result().get("status") == "finished":
        console.print(f"The run {run.path} is finished.", highlight=False, markup=False, soft_wrap=True)
        return run.path
    checkpoint = run.last_checkpoint()
    if checkpoint is not None:
        require_same_processes(checkpoint)
    return _run(run, checkpoint, config, console, command)


def resume_run(
    path: str | Path,
    console: Console,
    command: Sequence[str],
    longer: Mapping[str, Any] | None = None,
    given: RunConfig | None = None,
) -> Path:
    """Continue a run from its last checkpoint, with its own settings, and return its directory.

    Args:
        longer: ``steps``, ``epochs`` or ``patience`` of a training that goes on for longer than the run began with.
        given: settings that say whether code of models is trusted, and name the user's functions; None trusts none.

    Raises:
        LoraError: as :func:`resumable`, or another process is at the run; from the training on, result.json says what
            happened.
    """
    with on_main(from_main(lambda: RunDirectory.open(path)).held()):
        run, checkpoint, config = from_main(lambda: resumable(path, longer, given))
        return _run(SharedRun(run), checkpoint, config, console, command)


def resumable(
    path: str | Path, longer: Mapping[str, Any] | None = None, given: RunConfig | None = None
) -> tuple[RunDirectory, Path, RunConfig]:
    """The run in a directory, the checkpoint it can be continued from, and the settings it then has.

    Args:
        longer, given: as for :func:`resume_run`.

    Raises:
        ConfigError: not a run directory, or the run is finished and is not to be longer, or cannot be; its record
            names functions of the user's that ``given`` does not.
        CheckpointError: the run has no checkpoint.
    """
    run = RunDirectory.open(path)
    config = trusting(run.config(), given)
    require_named(config, given)
    if run.result().get("status") == "finished" and not longer:
        raise ConfigError(
            f"The run {str(run.path)!r} is finished; there is nothing to continue. Give it more steps beside "
            f"train.resume, train.steps={2 * int(run.result().get('steps', 1))} for example, or start a new run."
        )
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        raise CheckpointError(
            f"The run {str(run.path)!r} has no checkpoint to continue from (train.checkpoint_every is "
            f"{config.train.checkpoint_every}). Start a new run{_from_there(run)}."
        )
    require_same_processes(checkpoint)
    return run, checkpoint, prolonged(run, checkpoint, config, longer) if longer else config


def prolonged(run: RunDirectory, checkpoint: Path, config: RunConfig, longer: Mapping[str, Any]) -> RunConfig:
    """The settings of a run that goes on for longer; its warm-up stays the one it had.

    Raises:
        ConfigError: it would not be longer, it was stopped for its patience, or its rates would have been others.
    """
    state = read_json(checkpoint / STATE_FILE)
    done, planned = int(state["global_step"]), int(state["max_steps"])
    changes = dict(longer)
    if changes.keys() & {"steps", "epochs"}:
        changes = {"steps": None, "epochs": None} | changes
    train = replace(config.train, **changes)
    schedule = config.optim.schedule
    if SCHEDULES.get(schedule).ends and (train.steps, train.epochs) != (config.train.steps, config.train.epochs):
        raise ConfigError(
            f"With optim.schedule={schedule} the rates of a longer training are others from its first step on, so the "
            f"run {str(run.path)!r} cannot become one (a run with optim.schedule=constant could). Start a new run"
            f"{_from_there(run) or ' with more steps'}."
        )
    if train.steps is not None and train.steps <= done:
        raise ConfigError(
            f"The run {str(run.path)!r} has a checkpoint of step {done} already, found train.steps={train.steps}. Give "
            "more steps."
        )
    if train.epochs is not None and train.epochs <= float(state.get("epoch") or 0):
        raise ConfigError(
            f"The run {str(run.path)!r} has gone over its rows {state['epoch']:g} times already, found "
            f"train.epochs={train.epochs:g}. Give more."
        )
    if stopped := run_out(state.get("log_history", ()), train.patience):
        raise ConfigError(
            f"The run {str(run.path)!r} stops for train.patience={train.patience}: {stopped}. Give train.patience=null "
            "or more beside train.steps."
        )
    warmup = float(steps_of(warmup_of(config.optim, planned), planned))
    return replace(config, train=train, optim=replace(config.optim, warmup=warmup))


def _from_there(run: RunDirectory) -> str:
    if run.model.is_dir():
        return f" from its model: model={run.model}"
    return f" from its adapter: peft.adapter={run.adapter}" if run.adapter.is_dir() else ""


def _run(
    run: SharedRun,
    checkpoint: Path | None,
    config: RunConfig,
    console: Console,
    command: Sequence[str],
    samples: str | None = None,
) -> Path:
    spent = _Spent(run)
    record = _Record(run, spent)
    with _threads(config.threads), _recorded(record, console), ending_together(record.fail):
        prepared = prepare(config, console, partial(require_room, config))
        if samples not in (None, prepared.data.sha256):
            raise DataError(
                f"{prepared.data.source} gives other samples than the runs this one is to be compared with saw "
                f"(samples_sha256 {prepared.data.sha256:.12} and {samples:.12}): the records, the tokenizer or a "
                "setting of data differ. Restore them, or compare in another folder. Nothing was trained."
            )
        record.begin()
        if checkpoint is None or config != run.config():
            run.create(config)
        run.put_aside_after(checkpoint)
        if run.metrics():  # of a part that is done again
            run.drop_metrics_after(step_of(checkpoint))
        run.write_environment(environment(command))
        run.update_result(status="running", error=None)
        console.print(f"Run directory: {run.path}", highlight=False, markup=False, soft_wrap=True)
        train(prepared, config, run, console, checkpoint)
        spent.record()
        run.update_result(status="finished", error=None)
    return run.path


class _Spent:
    """Time and memory of a run over all its parts, from here on those of this part."""

    def __init__(self, run: SharedRun) -> None:
        self._started, self._peaks = time.monotonic(), Peaks()
        self._run, self._earlier = run, run.result()
        seconds = self._earlier.get("seconds") or {}
        logged = [float(row["seconds"]) for row in run.metrics() if "seconds" in row]
        parts = [float(seconds[name]) for name in seconds if name != "total"]
        trained = [] if "train" in seconds else logged[-1:]
        # a part that was killed has recorded no total: what it has recorded is the least it took
        self._before = max(float(seconds.get("total", 0.0)), sum(parts) + sum(trained))

    def record(self) -> None:
        """Into result.json; one process alone may call it."""
        if not is_main():
            return
        now = RunDirectory(self._run.path).result().get("seconds") or {}
        total = round(self._before + time.monotonic() - self._started, 1)
        self._run.update_result(seconds={**now, "total": total}, **self._peaks.measured(self._earlier))


class _Record:
    """Says of a run how it failed, from its first write on: what fails before leaves it as it was."""

    def __init__(self, run: SharedRun, spent: _Spent) -> None:
        self.run = run
        self._spent, self._begun = spent, False

    def begin(self) -> None:
        """The first write is next."""
        self._begun = True

    @property
    def begun(self) -> bool:
        return self._begun and (self.run.path / CONFIG).is_file()

    def fail(self, error: str) -> None:
        """Record the error, and the time up to here; the error itself is what is to be heard of, whatever comes of it.
        """
        if not self.begun:
            return
        for _ in range(_TRIES):
            try:
                with suppress(LoraError, OSError):  # the disk is full, perhaps
                    self.run.fail(error)
                with suppress(LoraError, OSError):
                    self._spent.record()
                return
            except KeyboardInterrupt:  # told to stop twice: what was begun is done all the same
                continue


_TRIES = 3


@contextmanager
def _recorded(record: _Record, console: Console) -> Iterator[None]:
    """What ends the block before its time is in result.json afterwards, and what it took up to there."""
    try:
        yield
    except KeyboardInterrupt:
        record.fail("interrupted")
        if record.begun:
            _say_how_to_continue(record.run, console)
        raise
    except BaseException as error:
        record.fail(f"{type(error).__name__}: {error}")
        raise


def _say_how_to_continue(run: SharedRun, console: Console) -> None:
    found = last_checkpoint(run.checkpoints)
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
