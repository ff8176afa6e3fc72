"""Which of a trainer's checkpoints are complete."""

from __future__ import annotations

import json
from pathlib import Path

from lorafa.errors import CheckpointError
from lorafa.processes import world_size

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
