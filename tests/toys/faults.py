"""A disk on which one step of writing goes wrong: it is killed there, cut short, refused or interrupted.

The steps below one folder are counted as they are taken through Python: files opened to be written, writes, renames,
links, syncs, folders made and removed. So each step of a save can fail in turn, and none by luck.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lorafa.errors import CheckpointError
from lorafa.storage import renames


class Killed(BaseException):
    """The process is gone: no handler and no clean-up does anything to the disk any more."""


REFUSALS = {"full": errno.ENOSPC, "forbidden": errno.EPERM, "broken once": errno.EIO}
"""Faults of one step, which those after it do not have: a full disk, a missing right, an error of the device."""
KILLS = ("killed before", "killed after", "cut")
INTERRUPTS = ("interrupted before", "interrupted after")
FOR_GOOD = "broken for good"
"""From this step on nothing can be written, and nothing removed."""
FAULTS = (*KILLS, *REFUSALS, *INTERRUPTS, FOR_GOOD)
FEW = ("killed before", "cut", "full", "interrupted after", FOR_GOOD)
"""Those that lead to each state there is: killed after a step is killed before the next one."""


class Disk:
    """Counts the steps of writing below ``root`` inside :meth:`watched`, and spoils number ``at`` by ``fault``."""

    def __init__(self, root: Path, at: int = -1, fault: str = "") -> None:
        self.root, self.at, self.fault = os.path.realpath(root), at, fault
        self.steps: list[str] = []
        self._dead = self._broken = False
        self._lock = threading.RLock()

    def step(self, what: str, place: Any, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Take one step, or go wrong at it; ``half`` does a part of it."""
        path = self._inside(place)
        if path is None:
            return act()
        with self._lock:
            if self._dead:
                raise Killed
            if self._broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            number = len(self.steps)
            self.steps.append(f"{what} {os.path.relpath(path, self.root)}")
            return act() if number != self.at else self._spoiled(path, act, half or act)

    def _spoiled(self, path: str, act: Callable[[], Any], half: Callable[[], Any]) -> Any:
        if self.fault in KILLS:
            self._dead = True
            if self.fault != "killed before":
                with suppress(OSError):
                    (act if self.fault == "killed after" else half)()
            raise Killed
        if self.fault in INTERRUPTS:
            if self.fault == "interrupted after":
                with suppress(OSError):
                    act()
            raise KeyboardInterrupt
        self._broken = self.fault == FOR_GOOD
        code = REFUSALS.get(self.fault, errno.EIO)
        raise OSError(code, os.strerror(code), path)

    def _inside(self, place: Any) -> str | None:
        """The path of a file or folder below the root; None for any other."""
        if isinstance(place, int):
            try:
                place = os.readlink(f"/proc/self/fd/{place}").removesuffix(" (deleted)")
            except OSError:
                return None
        path = os.path.abspath(os.fsdecode(place))
        return path if path.startswith(self.root + os.sep) or path == self.root else None

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Inside the block the steps are counted, and one of them fails."""
        with mock.patch.multiple(os, **self._calls()), self._patched():
            yield self

    @contextmanager
    def _patched(self) -> Iterator[None]:
        opened, saved, exchanged = io.open, torch.save, renames.exchange

        def open_(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if isinstance(file, int) or not set("wax+") & set(mode) or self._inside(file) is None:
                return opened(file, mode, *arguments, **named)
            return _File(self, self.step("open", file, lambda: opened(file, mode, *arguments, **named)), file)

        def save(value: Any, file: Any, *arguments: Any, **named: Any) -> None:
            def half() -> None:
                saved(value, file, *arguments, **named)
                size = os.stat(file).st_size
                with opened(file, "r+b") as cut:
                    cut.truncate(size // 2)

            self.step("write", file, lambda: saved(value, file, *arguments, **named), half)

        def exchange(one: Path, other: Path) -> bool:
            done: bool = self.step("exchange", other, lambda: exchanged(one, other))
            return done

        with (
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(io, "open", open_),
            mock.patch.object(torch, "save", save),
            mock.patch.object(renames, "exchange", exchange),
        ):
            yield

    def _calls(self) -> dict[str, Callable[..., Any]]:
        def on(name: str, which: int = 0) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                place = arguments[which]
                folder = named.get("dir_fd")
                if folder is not None and not isinstance(place, int):
                    place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place)
                return self.step(name, place, lambda: real(*arguments, **named))

            return call

        def open_(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            def act() -> int:
                return real_open(path, flags, *arguments, **named)

            if not flags & os.O_CREAT:
                return act()
            found: int = self.step("create", path, act)
            return found

        def write(descriptor: int, data: Any) -> int:
            view = memoryview(data)
            done: int = self.step(
                "write", descriptor, lambda: real_write(descriptor, data),
                lambda: real_write(descriptor, view[: len(view) // 2]),
            )  # fmt: skip
            return done

        real_open, real_write = os.open, os.write
        # synced by the test's own disk: that it is asked for is a step, and waiting for it takes most of the time
        first = ("unlink", "remove", "mkdir", "rmdir", "fsync", "truncate", "ftruncate", "posix_fallocate", "sendfile")
        second = ("rename", "replace", "link", "copy_file_range")
        return {name: on(name) for name in first} | {name: on(name, 1) for name in second} | {
            "open": open_, "write": write,
        }  # fmt: skip


class _File:
    """A file that is written to, each write a step."""

    def __init__(self, disk: Disk, file: Any, path: Any) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data: Any) -> int:
        part = memoryview(data) if not isinstance(data, str) else data
        done: int = self._disk.step(
            "write", self._path, lambda: self._file.write(data), lambda: self._file.write(part[: len(part) // 2])
        )
        return done

    def truncate(self, *size: int) -> int:
        done: int = self._disk.step("truncate", self._path, lambda: self._file.truncate(*size))
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


@dataclass(frozen=True)
class Spoiled:
    """A save that went wrong."""

    fault: str
    what: str
    """Which step it was, in words."""
    raised: BaseException | None


AFTER_WHICH_SOMETHING_IS_LEFT = (*KILLS, FOR_GOOD)


def is_leaving(path: Path) -> bool:
    """Whether a file or folder is one that a writer had not finished, or one inside of such a folder."""
    return any(part.startswith(".") and part.endswith((".tmp", ".old")) for part in path.parts)


def files_in(folder: Path, *, leavings: bool = False) -> dict[str, bytes]:
    """The files below a folder with their bytes, without what writers have left half done, unless that is asked for."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (folder / path).read_bytes() for path in found if leavings or not is_leaving(path)}


def every_fault(
    old: Path, place: Path, save: Callable[[Path], Any], faults: Sequence[str] = FAULTS, every: int = 1
) -> Iterator[Spoiled]:
    """Spoil each step (or every n-th) of ``save(place)`` in turn, each time over a copy of ``old``; nothing is synced.

    The state of ``place`` is to be looked at before the next one is asked for.
    """
    with mock.patch.object(os, "fsync", return_value=None):
        _fresh(old, place)
        whole = Disk(place.parent)
        with whole.watched():
            save(place)
        assert whole.steps
        for count in range(every // 2, len(whole.steps), every):
            for fault in faults:
                _fresh(old, place)
                disk, raised = Disk(place.parent, count, fault), None
                try:
                    with disk.watched():
                        save(place)
                except (Exception, KeyboardInterrupt, Killed) as error:
                    raised = error
                if count < len(disk.steps):  # one more or less where threads write
                    yield Spoiled(fault, f"{fault} at step {count}, {disk.steps[count]}", raised)


def _fresh(old: Path, place: Path) -> None:
    for left in (*place.parent.glob(".*"), place):
        shutil.rmtree(left, ignore_errors=True)
    if old.exists():
        shutil.copytree(old, place)


def check_every_fault(
    old: Path,
    save: Callable[[Path], Any],
    tmp_path: Path,
    faults: Sequence[str] = FAULTS,
    look: Callable[[Path], None] | None = None,
    every: int = 1,
) -> int:
    """At every step of ``save`` over ``old`` all files are the old ones or the new ones, and the next save goes well.

    Args:
        every: only every n-th step.
        look: looks at what there is after each fault in place of that, where files may be missing for a while because
            something finds them.

    Returns:
        How many faults there were.
    """
    place, after = tmp_path / "work" / "place", tmp_path / "after" / "place"
    place.parent.mkdir()
    after.parent.mkdir()
    if old.exists():
        shutil.copytree(old, after)
    save(after)
    before, wanted = files_in(old), files_in(after)
    count = 0
    for spoiled in every_fault(old, place, save, faults, every):
        count += 1
        fault, what, raised = spoiled.fault, spoiled.what, spoiled.raised
        found, all_found = files_in(place), files_in(place, leavings=True)
        if look is None:
            assert found in (before, wanted), what
        else:
            look(place)
        if fault in REFUSALS:
            assert raised is None or type(raised) is CheckpointError, (what, raised)
            assert found == (wanted if raised is None else before), what
            assert raised is None or (all_found == before and not _leavings(place)), what
            assert raised is None or os.strerror(REFUSALS[fault]) in str(raised), (what, raised)
        elif fault == FOR_GOOD:
            assert raised is None or type(raised) is CheckpointError, (what, raised)
        elif fault in INTERRUPTS:
            assert raised is None or type(raised) is KeyboardInterrupt, (what, raised)
            assert found in (before, wanted), what
        else:
            assert type(raised) is Killed, (what, raised)
        if fault in AFTER_WHICH_SOMETHING_IS_LEFT:
            save(place)
            assert files_in(place, leavings=True) == wanted, what
            assert not _leavings(place), what
    return count


def _leavings(place: Path) -> list[Path]:
    return [path for path in place.parent.rglob(".*") if is_leaving(path)]
