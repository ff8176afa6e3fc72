"""Which of a trainer's checkpoints are whole, and how one is written so that this can be told.

A checkpoint's last file, ``checkpoint.json``, has the size and the SHA-256 of every other and says how many processes
wrote it. It comes once all the others are on the disk. While they are written it says that they are not whole yet, so
that what a killed process leaves is known from what a version without this file has written.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorafa.errors import CheckpointError, first_line, shorten, warn
from lorafa.processes import world_size
from lorafa.storage.leavings import is_temporary
from lorafa.storage.refusals import refusal
from lorafa.storage.renames import sync_folder, sync_tree
from lorafa.storage.wheels import sha256_of
from lorafa.storage.whole import free_space, make_folder, read_json, write_json

STATE_FILE = "trainer_state.json"
"""What the trainer writes last."""
CONTENTS = "checkpoint.json"
"""What is written last of all."""
STATES = ("optimizer.pt", "scheduler.pt")


# ---- which are whole ------------------------------------------------------------------------------------------------


def last_checkpoint(folder: str | Path, tell: Callable[[str], None] | None = None) -> Path | None:
    """The whole checkpoint of the highest step in a trainer's output folder, or None.

    Args:
        tell: is told of those of higher steps, which are not whole, what is wrong with them.
    """
    steps = _by_step(Path(folder))
    for step in sorted(steps, reverse=True):
        if not (wrong := missing_files(steps[step])):
            return steps[step]
        if tell is not None:
            tell(
                f"{steps[step]} is passed over, for it is not whole: {shorten(wrong)} missing or damaged. The newest "
                "whole checkpoint before it is taken, if there is one."
            )
    return None


def newest_whole(folder: str | Path) -> Path | None:
    """As :func:`last_checkpoint`, with a warning for each that is passed over."""
    return last_checkpoint(folder, warn)


def missing_files(checkpoint: Path) -> list[str]:
    """Names of files without which a training cannot continue as it was; one that is not what was written counts as
    missing."""
    contents = _contents(checkpoint)
    if contents is None:
        return _missing_by_name(checkpoint)
    files = contents.get("files")
    if not isinstance(files, dict) or not _is_count(contents.get("processes")):
        return [CONTENTS]
    missing = [name for name in _needed(contents["processes"]) if name not in files]
    return missing + [str(name) for name, written in files.items() if not _is_as_written(checkpoint / name, written)]


def _contents(checkpoint: Path) -> Mapping[str, Any] | None:
    """What a checkpoint says it holds; nothing while it is being written, and None for one of an older version."""
    if not os.path.lexists(checkpoint / CONTENTS):
        return None
    try:
        return read_json(checkpoint / CONTENTS)
    except CheckpointError:
        return {"files": None}


def _needed(processes: int) -> list[str]:
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{number}.pth" for number in range(processes)]
    return [*STATES, *states, STATE_FILE]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20


def _is_as_written(path: Path, written: Any) -> bool:
    try:
        # the size first, which tells most damage at no cost
        return path.is_file() and path.stat().st_size == written["bytes"] and sha256_of(path) == written["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _missing_by_name(checkpoint: Path) -> list[str]:
    """The same for a checkpoint without sizes and digests: by names, and by the sums inside of torch's files."""
    numbers = _numbered(checkpoint)
    states = [f"rng_state_{number}.pth" for number in range(max(numbers) + 1)] if numbers else ["rng_state.pth"]
    missing = [name for name in (*STATES, *states) if not _is_whole_zip(checkpoint / name)]
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        missing.append(STATE_FILE)
    return missing


def _is_whole_zip(path: Path) -> bool:
    """Whether a file that `torch.save` wrote is there and not cut short; each part of it has its CRC."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is None
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _by_step(folder: Path) -> dict[int, Path]:
    return {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if _is_number(path.name[11:])}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def state_of(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint says of the training: ``global_step``, ``log_history`` and what else transformers writes.

    Raises:
        CheckpointError: it says nothing that could be.
    """
    state = read_json(checkpoint / STATE_FILE)
    steps, rows, best = (state.get(name) for name in ("global_step", "log_history", "best_model_checkpoint"))
    kept = state.get("stateful_callbacks", {})
    if not (
        isinstance(steps, int)
        and steps >= 0
        and isinstance(rows, list)
        and all(isinstance(row, dict) and _is_measured(row) for row in rows)
        and (best is None or isinstance(best, str))
        and isinstance(kept, dict)
    ):
        raise CheckpointError(
            f"{checkpoint / STATE_FILE} does not hold the state of a training. Resume from another checkpoint."
        )
    return state


def _is_measured(row: Mapping[str, Any]) -> bool:
    """Whether what is logged of a step has a held-out loss of a step, where it has one."""
    return "eval_loss" not in row or (isinstance(row["eval_loss"], (int, float)) and isinstance(row.get("step"), int))


def step_of(checkpoint: Path | None) -> int:
    """The steps made before a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def require_same_processes(checkpoint: Path) -> None:
    """Raises CheckpointError where a checkpoint is of another number of processes than there are now.

    Each had its own batches and random numbers.
    """
    contents = _contents(checkpoint)
    wrote = contents.get("processes") if contents else len(_numbered(checkpoint)) or 1
    if wrote != world_size():
        raise CheckpointError(
            f"{checkpoint} was written by {wrote} process{'es' if wrote != 1 else ''} and there "
            f"{'are' if world_size() > 1 else 'is'} {world_size()} now, whose batches would be others. Start {wrote} "
            "to continue it, or a new run from its adapter (peft.adapter)."
        )


def _numbered(checkpoint: Path) -> set[int]:
    """The processes whose random state a checkpoint holds; none where one was alone."""
    names = [path.name[10:-4] for path in checkpoint.glob("rng_state_*.pth")]
    return {int(name) for name in names if _is_number(name)}


# ---- how one is written ---------------------------------------------------------------------------------------------


def begin(checkpoint: Path) -> None:
    """Say of a checkpoint, which may be there from before, that it is not whole yet."""
    make_folder(checkpoint)
    write_json(checkpoint / CONTENTS, {})
    for name in (*STATES, STATE_FILE, *(path.name for path in checkpoint.glob("rng_state*.pth"))):
        (checkpoint / name).unlink(missing_ok=True)


def seal(checkpoint: Path) -> None:
    """Bring all that a checkpoint holds to the disk, and then say what that is."""
    sync_tree(checkpoint)
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and not is_temporary(path))
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
        if path != checkpoint / CONTENTS
    }
    write_json(checkpoint / CONTENTS, {"processes": world_size(), "files": files})
    sync_folder(checkpoint.parent)


@contextmanager
def whole_or_none(checkpoint: Path) -> Iterator[None]:
    """A checkpoint that the block cannot write to its end is removed; those before it stay.

    Raises:
        CheckpointError: it could not be written, the disk is full for example.
    """
    try:
        yield
    except CheckpointError:
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise
    except Exception as error:
        if (refused := refusal(error)) is None:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        reason = refused.strerror or first_line(refused)
        newest = last_checkpoint(checkpoint.parent)
        raise CheckpointError(
            f"{checkpoint} could not be written: {reason}.{free_space(checkpoint.parent)} What was there of it is "
            f"removed. Make room and continue from the last one: {newest or 'none was written'}."
        ) from error


def drop_oldest(folder: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Remove the oldest checkpoints, as far as there are more than ``limit``; None or 0 keeps all of them.

    Args:
        newest: stays, and so does what has the name of ``best``.
    """
    if not limit or limit < 0:
        return
    stay = {newest.name, *([Path(best).name] if best else [])}
    steps = _by_step(folder)
    oldest = sorted(steps, key=lambda step: (int(steps[step].stat().st_mtime), step))  # of an earlier training perhaps
    others = [steps[step] for step in oldest if steps[step].name not in stay]
    for checkpoint in others[: max(0, len(steps) - max(limit, len(stay)))]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def put_aside_after(folder: Path, checkpoint: Path | None) -> None:
    """Clear the place of checkpoints of higher steps than the one that is continued from, which are not whole.

    What a killed process was writing is removed, and one that was damaged later has another name from then on.
    """
    for step, path in _by_step(folder).items():
        if checkpoint is not None and step <= step_of(checkpoint):
            continue
        contents = _contents(path)
        if contents == {} or (contents is None and not (path / STATE_FILE).is_file()):
            shutil.rmtree(path, ignore_errors=True)
            continue
        names = [f"damaged-{path.name}", *(f"damaged-{path.name}-{number}" for number in range(2, 1000))]
        with suppress(OSError, StopIteration):
            path.rename(next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name))))
