"""The safetensors files of a model, written tensor by tensor: memory holds one tensor at a time.

Shapes and dtypes are known before any value is, so the headers are written first, and each tensor goes to its place
when it is ready. A tensor that stays as it is goes from file to file without passing through memory of this process.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafa.errors import CheckpointError
from lorafa.storage.base_weights import INDEX, WHOLE
from lorafa.storage.model_files import Stored
from lorafa.storage.octets import header_of, octets
from lorafa.storage.whole import write_json

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK = 32 * 2**20
"""Bytes that are copied at a time."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room."""


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    copied: Stored | None = None
    """Whose bytes it has; None: its values are still to be made."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    name: str
    tensors: Sequence[Planned]
    metadata: Mapping[str, str]

    @property
    def header(self) -> bytes:
        return header_of(((one.name, one.dtype, one.shape, one.nbytes) for one in self.tensors), self.metadata)

    def starts(self) -> list[int]:
        """Where each tensor begins, counted from the end of the header."""
        ends = [0]
        for tensor in self.tensors:
            ends.append(ends[-1] + tensor.nbytes)
        return ends[:-1]


def arranged(name: str, tensors: Iterable[Planned], metadata: Mapping[str, str]) -> PlannedFile:
    """A file of tensors in an order in which each begins at a multiple of its item size."""
    return PlannedFile(name, sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize), metadata)


def in_shards(tensors: Iterable[Planned], most: int, metadata: Mapping[str, str]) -> list[PlannedFile]:
    """The tensors in files of at most ``most`` bytes of data each, or of one tensor that alone is larger."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    stem = WHOLE.removesuffix(".safetensors")
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WHOLE]
    return [arranged(name, group, metadata) for name, group in zip(names, groups, strict=True)]


class ModelWriter:
    """Writes planned files into a folder; a with-block, after which all of it is on the disk.

    A tensor is written by a second thread while the next one is made, and a file whose last one was written is brought
    to the disk by a third. Every place is written to by one thread at a time.
    """

    def __init__(self, folder: Path, files: Sequence[PlannedFile], said: Callable[[int], None] = lambda done: None):
        """
        Args:
            said: told how many bytes were written, each time some were.
        """
        self.folder, self.files, self._said = folder, list(files), said
        self._places: dict[str, tuple[FileIO, int, Planned]] = {}  # name -> (file, first byte, what is to come)
        self._missing: dict[FileIO, set[str]] = {}
        self._stack = ExitStack()
        self._syncing: list[Future[None]] = []
        self._writing: tuple[Future[None], FileIO, str] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what was opened is closed where a later file cannot be
            self._pool = stack.enter_context(ThreadPoolExecutor(1))
            self._writes = stack.enter_context(ThreadPoolExecutor(1))
            for planned in self.files:
                file = stack.enter_context(open(self.folder / planned.name, "wb", buffering=0))
                header = planned.header
                _reserve(file, len(header) + sum(tensor.nbytes for tensor in planned.tensors))
                _write(file, memoryview(header), 0)
                for tensor, start in zip(planned.tensors, planned.starts(), strict=True):
                    self._places[tensor.name] = file, len(header) + start, tensor
                self._missing[file] = {tensor.name for tensor in planned.tensors}
                if not planned.tensors:
                    self._sync(file)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._stack:
            if kind is not None:
                self._writes.shutdown(wait=True, cancel_futures=True)
                self._pool.shutdown(wait=True, cancel_futures=True)
                return
            self._wait()
            if left := [name for names in self._missing.values() for name in names]:
                raise RuntimeError(f"{len(left)} planned tensors were not written: {left[:3]}")
            for one in self._syncing:
                one.result()
        if self._is_sharded():
            self._write_index()

    def copy(self, name: str) -> None:
        """Write a tensor whose bytes are in a file already.

        Raises:
            CheckpointError: that file cannot be read, or has become shorter.
        """
        self._wait()  # which may be for the same file
        file, start, planned = self._places[name]
        source = planned.copied
        assert source is not None, name
        with source.open() as there:
            done = 0
            while done < planned.nbytes:
                most = min(_CHUNK, planned.nbytes - done)
                count = _copy(source, there, source.start + done, file, start + done, most)
                if not count:
                    raise CheckpointError(f"{source.file} was cut off while it was read. Fetch or save it again.")
                done += count
                self._said(count)
        self._done(file, name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the values of a tensor, which has the dtype and the shape that were planned."""
        file, start, planned = self._places[name]
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise RuntimeError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was made where {planned} was planned")
        self._wait()
        data = octets(tensor.detach().contiguous())
        self._writing = self._writes.submit(_write, file, data, start), file, name
        self._said(planned.nbytes)

    def _wait(self) -> None:
        """For the tensor before: one is written while the next is made, and no more than one waits."""
        if self._writing is not None:
            writing, file, name = self._writing
            self._writing = None
            writing.result()
            self._done(file, name)

    def _done(self, file: FileIO, name: str) -> None:
        self._missing[file].discard(name)
        if not self._missing[file]:
            self._sync(file)

    def _sync(self, file: FileIO) -> None:
        self._syncing.append(self._pool.submit(os.fsync, file.fileno()))

    def _is_sharded(self) -> bool:
        return [planned.name for planned in self.files] != [WHOLE]

    def _write_index(self) -> None:
        tensors = [(planned.name, tensor) for planned in self.files for tensor in planned.tensors]
        total = sum(tensor.nbytes for _, tensor in tensors)
        numbers = sum(math.prod(tensor.shape) for _, tensor in tensors)
        write_json(
            self.folder / INDEX,
            {
                "metadata": {"total_parameters": numbers, "total_size": total},
                "weight_map": {tensor.name: file for file, tensor in tensors},
            },
        )


def _reserve(file: FileIO, size: int) -> None:
    """Take the room on the disk, so that a full one is noticed before any work; where that is not possible, later."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in _FULL:
            raise
        file.truncate(size)


def _write(file: FileIO, data: memoryview, start: int) -> None:
    file.seek(start)
    while data:
        data = data[file.write(data) :]


def _copy(stored: Stored, source: FileIO, start: int, target: FileIO, place: int, most: int) -> int:
    """Copy bytes between files, within the system where it can; how many were, 0 at the end of the source."""
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), most, start, place)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in _FULL:
            raise
    try:
        source.seek(start)
        data = source.read(most)
    except OSError as error:
        raise stored.unreadable(error) from error
    _write(target, memoryview(data), place)
    return len(data)
