"""Which of a trainer's checkpoints are complete."""

from __future__ import annotations

import json
from pathlib import Path

STATE_FILE = "trainer_state.json"
"""What the trainer writes last: everything else is there when this is."""


def last_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a trainer's output folder, or None."""
    steps = {int(path.name[11:]): path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()}
    return next((steps[step] for step in sorted(steps, reverse=True) if not missing_files(steps[step])), None)


def missing_files(checkpoint: Path) -> list[str]:
    """Names of files without which a training cannot continue as it was; a state cut short counts as missing."""
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (checkpoint / name).is_file()]
    if not any(checkpoint.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        missing.append(STATE_FILE)
    return missing


def step_of(checkpoint: Path | None) -> int:
    """The steps made before a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
