"""Files in one folder, or in several, that take their places together.

A file that says how others are to be read is taken away before they are replaced, and comes last: at no moment does it
stand beside what it does not belong to. Each folder that is written has a hidden folder meanwhile, with the new files
and second names of the old ones::

    folder/.<id>.tmp/adapter_config.json          not in its place yet
    folder/.<id>.tmp/old/adapter_config.json      taken away

Who is killed has it left, so that a reader finds the file that is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorafa.errors import CheckpointError, LoraError
from lorafa.storage.leavings import is_temporary, own_folder, remove_left_over
from lorafa.storage.renames import sync_file, sync_folder
from lorafa.storage.whole import free_space, keep_as, new_folder

OLD = "old"
"""The folder in a hidden folder that holds the files which had the names before."""


@dataclass(frozen=True)
class _Stage:
    folder: Path
    hidden: Path
    last: str | None
    """The file that is taken away first, and comes last."""

    @property
    def names(self) -> list[str]:
        """The new files in the order in which they take their places."""
        found = sorted(path.name for path in self.hidden.iterdir() if path.is_file())
        return sorted(found, key=lambda name: name == self.last)


class Together:
    """Folders that are being written."""

    def __init__(self, open_: ExitStack) -> None:
        self._open, self.stages = open_, list[_Stage]()
        self.undone = True
        """False where something failed that could not be taken back: what a reader needs is in the hidden folders."""

    def stage(self, folder: Path, last: str | None = None) -> Path:
        """A hidden folder to write files to that are to be in ``folder``; the same one where that was asked for before.

        Args:
            last: the name of the file that says how the others are to be read.
        """
        for one in self.stages:
            if one.folder == folder:
                return one.hidden
        self._open.enter_context(new_folder(folder))
        hidden = self._open.enter_context(own_folder(folder, kept=lambda: not self.undone))
        self.stages.append(_Stage(folder, hidden, last))
        return hidden

    def take_places(self) -> None:
        """Give all files their names; after an error those that had them have them again."""
        undo: list[Callable[[], None]] = []
        try:
            for stage in self.stages:
                _make_ready(stage)
            for stage in self.stages:
                _take_places(stage, undo)
        except BaseException:
            self.undone = False
            for step in reversed(undo):
                step()
            self.undone = True
            raise

    def error(self, error: OSError) -> CheckpointError:
        """What is raised for an error of the system."""
        path = Path(error.filename) if isinstance(error.filename, str) else Path()
        stage = next((one for one in self.stages if one.folder in path.parents), None)
        stage = stage or (self.stages[-1] if self.stages else None)
        if stage is None:
            return CheckpointError(f"{path} could not be written: {error.strerror or error}.")
        named = stage.folder / path.name if path.name and not is_temporary(path) else stage.folder
        after = "Nothing was changed."
        if not self.undone:
            after = f"What was there could not be put back either: it is in {stage.hidden}."
        return CheckpointError(
            f"{named} could not be written: {error.strerror or error}.{free_space(stage.folder)} {after} Make room or "
            "save to another folder."
        )


@contextmanager
def written_together() -> Iterator[Together]:
    """Have files take their places when the block ends without an error, those of all folders or none.

    A process that is killed leaves each folder as it was or as it is to be, or without its ``last`` file, which
    :func:`left_in` then finds. What earlier ones have left is removed at the end.

    Raises:
        CheckpointError: a folder cannot be written to, or the disk is full; what was there is as it was.
    """
    with ExitStack() as open_:
        together = Together(open_)
        try:
            yield together
            together.take_places()
        except LoraError as error:
            text = str(error)
            for stage in together.stages:
                text = text.replace(str(stage.hidden), str(stage.folder))
            if text == str(error):
                raise
            raise type(error)(text) from error
        except OSError as error:
            raise together.error(error) from error
    for stage in together.stages:
        remove_left_over(stage.folder)


def _make_ready(stage: _Stage) -> None:
    """Bring the new files to the disk, and give the old ones second names, by which they can come back."""
    for name in stage.names:
        sync_file(stage.hidden / name)
    if there := [name for name in stage.names if (stage.folder / name).is_file()]:
        (stage.hidden / OLD).mkdir()
        for name in there:
            keep_as(stage.folder / name, stage.hidden / OLD / name, or_copy=True)


def _take_places(stage: _Stage, undo: list[Callable[[], None]]) -> None:
    names, last, folder, old = stage.names, stage.last, stage.folder, stage.hidden / OLD
    if last in names and _equal(folder / last, stage.hidden / last):
        names.remove(last)  # it fits the files there are and those there will be
    elif last in names and (old / last).is_file():
        sync_folder(old)
        sync_folder(stage.hidden)
        undo.append(partial(os.replace, old / last, folder / last))
        (folder / last).unlink()
    for name in names:
        if name == last:
            sync_folder(folder)  # a disk may have these changes in another order after a power cut
        undo.append(partial(_take_back, stage, name))
        os.replace(stage.hidden / name, folder / name)
    sync_folder(folder)


def _take_back(stage: _Stage, name: str) -> None:
    """Undo a rename, where there was one: the file that had the name has it again, but for the ``last`` one."""
    place = stage.folder / name
    if (stage.hidden / name).exists():
        return
    if name == stage.last or not (stage.hidden / OLD / name).exists():
        os.replace(place, stage.hidden / name)
    else:
        os.replace(stage.hidden / OLD / name, place)


def _equal(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.read_bytes() == other.read_bytes()
    return False


def left_in(folder: Path, name: str) -> Iterator[tuple[Path, bool]]:
    """Files called ``name`` that a killed process has left in a folder, and whether each is the old one."""
    with suppress(OSError):
        for hidden in sorted(path for path in folder.glob(".*.tmp") if is_temporary(path) and path.is_dir()):
            for path, is_old in ((hidden / name, False), (hidden / OLD / name, True)):
                if path.is_file():
                    yield path, is_old
