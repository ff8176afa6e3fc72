"""Files of cells between commas or tabs (.csv, .tsv), whose first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from lorafa.data.cells import Row
from lorafa.data.tables import Table, check_names
from lorafa.errors import DataError, first_line

if TYPE_CHECKING:
    from lorafa.data.tables import Chosen

LONGEST = 2**31 - 1
"""Characters of a cell: Python's own limit is 131,072, less than a long document has."""


class Delimited(Table):
    """Every cell is text. A cell with the delimiter, a double quote or a line end in it stands in double quotes, and a
    double quote in it is written twice."""

    delimiter: ClassVar[str]

    def rows(self, chosen: Chosen | None = None) -> Iterator[tuple[int, str, Row]]:
        with self.opened() as file:
            lines = self._cells(file)
            header = self._header(next(lines, (0, []))[1])
            for number, (line, cells) in enumerate(lines):
                place = f"{self.path}, line {line}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{place}: it has {len(cells)} cells, and the first line names {len(header)} columns. Put "
                        f"texts with {self.delimiter!r} or line ends in double quotes."
                    )
                if chosen is None or chosen[number]:
                    yield number, place, dict(zip(header, cells, strict=True))

    def _cells(self, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
        """(the line it begins at, the cells) of each row that is not blank, the names of the columns first."""
        texts = (self.decoded(content, at) for _, at, content in self.lines(file))
        reader = csv.reader(texts, delimiter=self.delimiter, strict=True)
        begins = 1
        with _long_cells():
            try:
                for cells in reader:
                    if cells:
                        yield begins, cells
                    begins = reader.line_num + 1
            except csv.Error as error:
                advice = "Close its double quotes, and write those inside a text twice."
                if "new-line" in str(error):  # a carriage return alone, with which no line ends here
                    advice = "Save it with line ends of \\n or \\r\\n."
                raise DataError(
                    f"{self.path}, line {begins}: cannot be read as cells: {first_line(error)}. {advice}"
                ) from error

    def _header(self, names: list[str]) -> list[str]:
        check_names(self.path, names)
        other = next((mark for mark in (";", ",", "\t") if len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise DataError(
                f"{self.path}: the first line is one column, {names[0]!r:.80}; the cells seem to stand between "
                f"{other!r}, where {self.delimiter!r} is expected. Save it as .csv with commas or as .tsv with tabs."
            )
        return names


class CommaSeparated(Delimited):
    """Cells between commas (.csv)."""

    delimiter = ","


class TabSeparated(Delimited):
    """Cells between tabs (.tsv)."""

    delimiter = "\t"


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of any length: the limit is one of the whole process."""
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)
