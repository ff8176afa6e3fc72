"""Which of a trainer's checkpoints are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafa.errors import CheckpointError, first_line
from lorafa.processes import world_size
from lorafa.storage.whole import free_space

STATE_FILE = "trainer_state.json"
"""What the trainer writes last: everything else is there when this is."""


def last_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a trainer's output folder, or None."""
    steps = {int(path.name[11:]): path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()}
    return next((steps[step] for step in sorted(steps, reverse=True) if not missing_files(steps[step])), None)


def missing_files(checkpoint: Path) -> list[str]:
    """Names of files without which a training cannot continue as it was; a state cut short counts as missing."""
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (checkpoint / name).is_file()]
    numbers = _numbered(checkpoint)
    if not numbers and not (checkpoint / "rng_state.pth").is_file():
        missing.append("rng_state.pth")
    missing += [f"rng_state_{number}.pth" for number in range(max(numbers, default=0)) if number not in numbers]
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        missing.append(STATE_FILE)
    return missing


@contextmanager
def whole_or_none(checkpoint: Path) -> Iterator[None]:
    """A checkpoint that the block cannot write to its end is removed; those before it stay.

    Raises:
        CheckpointError: it could not be written, the disk is full for example.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointError) as error:
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in _WRITERS):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        newest = last_checkpoint(checkpoint.parent)
        raise CheckpointError(
            f"{checkpoint} could not be written: {reason}.{free_space(checkpoint.parent)} What was there of it is "
            f"removed. Make room and continue from the last one: {newest or 'none was written'}."
        ) from error


_WRITERS = ("inline_container", "PytorchStreamWriter")
"""Names in what torch raises where its file cannot be written."""


def step_of(checkpoint: Path | None) -> int:
    """The steps made before a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def require_same_processes(checkpoint: Path) -> None:
    """Raises CheckpointError where a checkpoint is of another number of processes than there are now.

    Each had its own batches and random numbers.
    """
    wrote = len(_numbered(checkpoint)) or 1
    if wrote != world_size():
        raise CheckpointError(
            f"{checkpoint} was written by {wrote} process{'es' if wrote > 1 else ''} and there "
            f"{'are' if world_size() > 1 else 'is'} {world_size()} now, whose batches would be others. Start {wrote} "
            "to continue it, or a new run from its adapter (peft.adapter)."
        )


def _numbered(checkpoint: Path) -> set[int]:
    """The processes whose random state a checkpoint holds; none where one was alone."""
    names = [path.name[10:-4] for path in checkpoint.glob("rng_state_*.pth")]
    return {int(name) for name in names if name.isdigit()}
