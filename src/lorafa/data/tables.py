"""Files of rows, read from the beginning each time, and where that can be, one row at a time."""

from __future__ import annotations

import gzip
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorafa.data.cells import Row, parsed
from lorafa.errors import DataError, LoraError, SourceError, did_you_mean
from lorafa.settings.checks import repeated
from lorafa.storage.wheels import sha256_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Chosen = npt.NDArray[np.bool_]
    """For each row of a table or a source whether it is one of those that are read."""

_MARK = b"\xef\xbb\xbf"  # of a text in UTF-8, which some programs put first


class Table(ABC):
    """The rows of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None

    @abstractmethod
    def rows(self, chosen: Chosen | None = None) -> Iterator[tuple[int, str, Row]]:
        """(number from 0, where it stands, the row) of all rows or the chosen ones, in the order of the file.

        Raises:
            SourceError: the file cannot be read.
            DataError: it is not what its name says, a row is broken, or it has changed since it was first read.
        """

    def count(self) -> int:
        """How many rows there are; cheaper than to read them, where that can be."""
        return sum(1 for _ in self.rows())

    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.reading():
            return sha256_of(self.path)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What goes wrong with the file itself, in words.

        Raises:
            SourceError: it is not there, or cannot be read.
            DataError: it is damaged, or has changed since it was first read.
        """
        path = self.path
        try:
            if not path.is_file():
                near = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
                raise SourceError(
                    f"No file {str(path)!r}{what_it_is(path)}.{did_you_mean(path.name, near)} Check data=, it is a "
                    "path to a file."
                )
            there = path.stat()
            stamp = (there.st_size, there.st_mtime_ns)
            if self._stamp not in (None, stamp):
                raise DataError(f"{path} was changed while it was read. Start again once it stays as it is.")
            self._stamp = stamp
            yield
        except LoraError:
            raise
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is a damaged gzip file: {error}. Fetch or make it again.") from error
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, unpacked where its name ends in .gz."""
        zipped = self.path.suffix.lower() == ".gz"
        with self.reading(), gzip.open(self.path, "rb") if zipped else self.path.open("rb") as file:
            yield file  # type: ignore[misc]

    def lines(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, where its first byte stands, the line with its end) of each line."""
        at = 0
        for number, line in enumerate(file, 1):  # ends at \n alone: JSON strings may hold U+2028 and its like
            mark = len(_MARK) if number == 1 and line.startswith(_MARK) else 0
            yield number, at + mark, line[mark:]
            at += len(line)

    def decoded(self, line: bytes, at: int = 0) -> str:
        """A line as text.

        Raises:
            DataError: it is not UTF-8.
        """
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path} is not UTF-8 text: {error.reason} at byte {at + error.start + 1}. Convert it to UTF-8."
            ) from error


class JsonLines(Table):
    """One object a line (.jsonl)."""

    def rows(self, chosen: Chosen | None = None) -> Iterator[tuple[int, str, Row]]:
        advice = ""
        with self.opened() as file:
            for number, (line, at, content) in enumerate(self._written(file)):
                if not number:
                    a_list = content.lstrip().startswith(b"[")
                    advice = "It starts like one list of all rows: name the file .json." if a_list else ""
                if chosen is None or chosen[number]:
                    place = f"{self.path}, line {line}"
                    row = parsed(self.decoded(content, at).rstrip("\r\n"), place, advice or _MEND)
                    yield number, place, _an_object(row, place, advice or _MEND)

    def count(self) -> int:
        with self.opened() as file:
            return sum(1 for _ in self._written(file))

    def _written(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """The lines that are not blank."""
        return (line for line in self.lines(file) if line[2].strip())


class JsonList(Table):
    """One list of objects (.json), which is read as a whole."""

    def rows(self, chosen: Chosen | None = None) -> Iterator[tuple[int, str, Row]]:
        for number, row in enumerate(self._whole):
            if chosen is None or chosen[number]:
                place = f"{self.path}, row {number + 1}"
                yield number, place, _an_object(row, place, _ONE_A_LINE)

    def count(self) -> int:
        return len(self._whole)

    @cached_property
    def _whole(self) -> list[Any]:
        with self.opened() as file:
            content = file.read()
        mark = len(_MARK) if content.startswith(_MARK) else 0
        whole = parsed(self.decoded(content[mark:], mark), str(self.path), _ONE_A_LINE)
        if not isinstance(whole, list):
            raise DataError(
                f"{self.path} holds one {type(whole).__name__}, expected a list of objects, one a row. {_ONE_A_LINE}"
            )
        return whole


_MEND = "Mend or delete it; nothing was loaded."
_ONE_A_LINE = "If it holds one object a line, name it .jsonl; else mend it."


def _an_object(row: Any, place: str, advice: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f'{place}: found a {type(row).__name__}, expected an object such as {{"prompt": ...}}. {advice}'
        )
    return row


def check_names(path: Path, names: list[str]) -> None:
    """Raises DataError for two columns of one name: one of them would not be read."""
    if twice := repeated(names):
        raise DataError(f"{path}: two columns are called {twice[0]!r}. Rename one of them.")


def what_it_is(path: Path) -> str:
    """Why a path that is there is no file of rows."""
    if os.path.isdir(path):  # os.path answers of names that no file can have, too
        return ": it is a folder"
    if os.path.islink(path) and not os.path.exists(path):
        return ": it is a link to nothing"
    return ": a file of another kind" if os.path.exists(path) else ""
