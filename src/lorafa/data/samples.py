"""Samples as bytes, in memory or in a file: a few bytes a token, and one read for each that is asked for.

A file is read and not mapped: pages of a map count as memory of the process, and a file that is cut short while it is
mapped ends the process where a read can be answered with an error.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from lorafa.data.chat import IGNORE, Sample
from lorafa.errors import SourceError

HEAD = np.dtype([("place", "<i4"), ("number", "<i8"), ("truncated", "u1")])
"""What stands before the tokens of a sample: where its row stands, and whether it lost its tail."""
PER_TOKEN = 5
"""Bytes of a token: four of its id, one that says whether it is trained."""


class Bytes(Protocol):
    """Bytes that can be read anywhere."""

    def read(self, at: int, size: int) -> bytes: ...


class Store(Bytes, Protocol):
    """Bytes that are being written, and can be read all the while."""

    @property
    def begins(self) -> int:
        """Where the first sample begins."""

    def write(self, content: bytes, /) -> None: ...


class InMemory:
    """Bytes in memory."""

    begins = 0

    def __init__(self) -> None:
        self._content = bytearray()

    def write(self, content: bytes, /) -> None:
        self._content += content

    def read(self, at: int, size: int) -> bytes:
        return bytes(self._content[at : at + size])


class InFile:
    """Bytes of a file, which stays open; a copy in another process opens it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = path.open("rb", buffering=0)

    def read(self, at: int, size: int) -> bytes:
        """The bytes at a place.

        Raises:
            SourceError: the file has become shorter.
        """
        found = self._pieces(at, size)
        if len(found) != size:
            raise SourceError(f"{self.path} has become shorter while it was in use. Start again: it will be made anew.")
        return found

    def _pieces(self, at: int, size: int) -> bytes:
        if hasattr(os, "pread"):  # has no position that forked processes would share
            return os.pread(self._file.fileno(), size, at)
        with self._lock:
            self._file.seek(at)
            return self._file.read(size) or b""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class SampleWriter:
    """Writes samples one after another."""

    def __init__(self, file: Store) -> None:
        self._file = file
        self.sizes = array("i")
        """How many tokens each has."""
        self.truncated = bytearray()
        """For each whether it lost its tail."""
        self.places: dict[str, int] = {}
        """What the places of the rows begin with: the name of a file, and what is counted in it."""

    def add(self, sample: Sample) -> int:
        """Write a sample; its number."""
        first, blank, last = sample.place.rpartition(" ")
        counted = blank and last.isascii() and last.isdigit() and str(int(last)) == last and len(last) < 18
        place = self.places.setdefault(first if counted else sample.place, len(self.places))
        head = np.array((place, int(last) if counted else -1, sample.truncated), HEAD)
        ids = np.array(sample.input_ids, "<i4")
        content = head.tobytes() + ids.tobytes() + bytes(label != IGNORE for label in sample.labels)
        self._file.write(content)
        self.sizes.append(len(ids))
        self.truncated.append(sample.truncated)
        return len(self.sizes) - 1


class Stored:
    """What a :class:`SampleWriter` has written, sample by sample.

    Args:
        content: the bytes.
        sizes: how many tokens each sample has.
        places: what the places of the rows begin with.
        first: where the first sample begins.
    """

    def __init__(self, content: Bytes, sizes: npt.NDArray[Any], places: Sequence[str], first: int = 0) -> None:
        self.sizes = sizes
        self._content = content
        self._places = places
        self._begins = np.empty(len(sizes), np.int64)
        self._begins[:1] = first
        np.cumsum(PER_TOKEN * sizes[:-1] + HEAD.itemsize, out=self._begins[1:])
        self._begins[1:] += first

    def sample(self, number: int) -> Sample:
        """The sample of that number."""
        head, ids, trained = self.parts(number)
        labels = np.where(trained, ids, IGNORE)
        return Sample(ids.tolist(), labels.tolist(), bool(head["truncated"]), self._place(head))

    def parts(self, number: int) -> tuple[Any, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """What stands before its tokens, its ids, and which of them are trained."""
        size = int(self.sizes[number])
        content = self._content.read(int(self._begins[number]), HEAD.itemsize + PER_TOKEN * size)
        head = np.frombuffer(content, HEAD, 1)[0]
        ids = np.frombuffer(content, "<i4", size, HEAD.itemsize)
        return head, ids, np.frombuffer(content, "?", size, HEAD.itemsize + ids.nbytes)

    def _place(self, head: Any) -> str:
        first, number = self._places[head["place"]], int(head["number"])
        return first if number < 0 else f"{first} {number}"


class Samples(Sequence[Sample]):
    """Samples by their place in an order; a slice is such a sequence as well, over the same bytes.

    Args:
        stored: what :class:`SampleWriter` has written.
        order: which of these they are.
    """

    def __init__(self, stored: Stored, order: npt.NDArray[Any]) -> None:
        self.stored = stored
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.stored, self.order[index])
        return self.stored.sample(self.order[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self.stored.sample, self.order)

    @property
    def lengths(self) -> array[int]:
        """Tokens of each: plain integers when they are read, and four bytes each until then."""
        return array("i", self.stored.sizes[self.order].astype("i").tobytes())

    def tokens(self) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """The ids of each, and which of them are trained."""
        return (self.stored.parts(number)[1:] for number in self.order)
