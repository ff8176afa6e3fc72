"""Files of Apache Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorafa.data.cells import Row, as_row
from lorafa.data.tables import Table, check_names
from lorafa.errors import DataError, first_line

if TYPE_CHECKING:
    from lorafa.data.tables import Chosen

TOGETHER = 256
"""Rows that are in memory at once, beside what the reader keeps of their group."""


class Parquet(Table):
    """Rows in groups, of which those without a chosen row are not read."""

    def rows(self, chosen: Chosen | None = None) -> Iterator[tuple[int, str, Row]]:
        with self._file() as file:
            begin = 0
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if chosen is None or chosen[begin:end].any():
                    yield from self._of_group(file, group, begin, chosen)
                begin = end

    def _of_group(self, file: Any, group: int, number: int, chosen: Chosen | None) -> Iterator[tuple[int, str, Row]]:
        for batch in file.iter_batches(batch_size=TOGETHER, row_groups=[group]):
            if chosen is None or chosen[number : number + batch.num_rows].any():
                for offset, row in enumerate(batch.to_pylist()):
                    if chosen is None or chosen[number + offset]:
                        yield number + offset, f"{self.path}, row {number + offset + 1}", as_row(row)
            number += batch.num_rows

    def count(self) -> int:
        with self._file() as file:
            rows: int = file.metadata.num_rows
            return rows

    @contextmanager
    def _file(self) -> Iterator[Any]:
        import pyarrow  # with datasets; most runs read no such file
        from pyarrow.parquet import ParquetFile

        with self.reading():
            try:
                with ParquetFile(self.path) as file:
                    check_names(self.path, file.schema_arrow.names)
                    yield file
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise DataError(
                    f"{self.path} cannot be read as a parquet file: {first_line(error)}. Fetch or make it again."
                ) from error
