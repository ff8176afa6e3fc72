"""The tensors of a model on disk, one by one: where each lies in which safetensors file, and its bytes.

Files are read with plain reads and not mapped, so that memory holds what was asked for and no pages beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from lorafa.errors import CheckpointError, SourceError, shorten
from lorafa.storage.base_weights import INDEX, WHOLE, shards
from lorafa.storage.octets import DTYPES, octets
from lorafa.storage.tensors import entries_of, read_header


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self) -> FileIO:
        """The file, to read from."""
        try:
            return FileIO(self.file)
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.file} could not be read: {error.strerror or error}.")

    def read(self) -> Tensor:
        """All of it, on the CPU.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter than it was.
        """
        return self._read(0, self.shape)

    def rows(self, indices: Iterable[int]) -> Tensor:
        """Some rows of a tensor of two or more dimensions, and no bytes beside them."""
        width = self.shape[1:]
        length = math.prod(width) * self.dtype.itemsize
        return torch.stack([self._read(index * length, width) for index in indices])

    def _read(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        if not tensor.numel():
            return tensor
        view = octets(tensor)
        with self.open() as file:
            try:
                file.seek(self.start + offset)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise CheckpointError(f"{self.file} was cut off while it was read. Fetch or save it again.")
                    view = view[count:]
            except OSError as error:
                raise self.unreadable(error) from error
        return tensor


@dataclass(frozen=True)
class ModelFiles:
    """The safetensors files of a model and what their headers say; no tensor is read."""

    folder: Path
    tensors: dict[str, Stored]
    """By name, file by file in the order of their bytes."""
    metadata: dict[str, dict[str, str]]
    """File name -> the texts of its header."""
    index: Path | None
    """The index of a sharded model."""

    @property
    def files(self) -> list[str]:
        return list(self.metadata)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def model_files(folder: Path) -> ModelFiles:
    """Read the headers of all of a model's files and check them: every tensor is there, whole, once.

    Raises:
        SourceError: there are no safetensors files, or a shard is missing.
        CheckpointError: a file is cut off or damaged, or the index does not agree with the files.
    """
    single, index = folder / WHOLE, folder / INDEX
    if single.is_file():
        paths, listed = [single], None
    elif index.is_file():
        listed = {name: path.name for name, path in shards(index).items()}
        if strange := [name for name in set(listed.values()) if os.path.dirname(name)]:
            raise CheckpointError(f"{index} names files outside of its folder: {shorten(sorted(strange))}.")
        paths = [folder / name for name in sorted(set(listed.values()))]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        other = (
            f" It holds pickles ({shorten(pickles, 2)}), which can run code when they are opened: load the model "
            "in Python and save_pretrained it as safetensors first."
            if pickles
            else ""
        )
        raise SourceError(f"The folder {str(folder)!r} has no {WHOLE} and no {INDEX}.{other}")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, dict[str, str]] = {}
    for path in paths:
        for tensor in tensors_in(path):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name!r} is in {tensors[tensor.name].file.name} and in {path.name}. Fetch the model again."
                )
            tensors[tensor.name] = tensor
        metadata[path.name] = read_header(path)
    if listed is not None:
        held = {name: tensor.file.name for name, tensor in tensors.items()}
        if wrong := sorted(name for name, place in listed.items() if held.get(name) != place):
            raise CheckpointError(
                f"{index} says that {shorten(wrong, 3)} {'is' if len(wrong) == 1 else 'are'} in files that do not hold "
                "it. Fetch the model again."
            )
    return ModelFiles(folder, tensors, metadata, None if listed is None else index)


def tensors_in(path: Path) -> list[Stored]:
    """The tensors of one safetensors file in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, cut off or damaged, or holds numbers of a format that is not known.
    """
    entries = entries_of(path)
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    found, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(path, *item)):
        first, last = _offsets(path, name, entry)
        shape, dtype = entry.get("shape"), DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise CheckpointError(f"{path}: {name!r} is stored as {entry.get('dtype')!r}, which is not known here.")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError(f"{path} is damaged: its header gives {name!r} the shape {shape!r}. Fetch it again.")
        tensor = Stored(name, path, dtype, tuple(shape), begin + first)
        if tensor.nbytes != last - first or first < end:
            raise CheckpointError(
                f"{path} is damaged: its header gives {name!r} {last - first} bytes from {first}, its shape and dtype "
                f"ask for {tensor.nbytes}. Fetch or save it again."
            )
        end = last
        found.append(tensor)
    return found


def _offsets(path: Path, name: str, entry: dict[str, object]) -> tuple[int, int]:
    offsets = entry.get("data_offsets")
    if isinstance(offsets, list) and len(offsets) == 2:
        first, last = offsets
        if type(first) is int and type(last) is int and 0 <= first <= last:
            return first, last
    raise CheckpointError(f"{path} is damaged: its header places {name!r} at {offsets!r}. Fetch it again.")
