"""Rows, and files of all kinds with them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lorafa.data.selection import Division
from lorafa.data.sources import Choice, OpenData, load_records, open_data

Rows = Sequence[dict[str, Any]]


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + count)]


def as_jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_cells(rows: Rows, delimiter: str = ",") -> str:
    out = StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


TEXTS: dict[str, Callable[[Rows], str]] = {
    ".jsonl": as_jsonl,
    ".json": json.dumps,
    ".csv": as_cells,
    ".tsv": lambda rows: as_cells(rows, "\t"),
}
ENDINGS = [*TEXTS, *(f"{ending}.gz" for ending in TEXTS), ".parquet"]


def write_rows(path: Path, rows: Rows) -> Path:
    """The file that the ending of its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=3)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(TEXTS[path.suffixes[-2]](rows).encode()))
    else:
        path.write_text(TEXTS[path.suffix](rows), encoding="utf-8", newline="")
    return path


def load(*names: object, train_size: int | None = None, eval_size: Any = 0, seed: int = 0, **more: Any) -> Any:
    """The records of one source or several."""
    given = [str(name) for name in names]
    found = given[0] if len(given) == 1 else given
    return load_records(found, train_size=train_size, eval_size=eval_size, seed=seed, **more)


def found(*names: object, train_size: int | None = None, eval_size: Any = 0, seed: int = 0, **more: Any) -> OpenData:
    """The same, not yet read."""
    division = Division(train_size, eval_size, seed, more.pop("weights", None))
    return open_data(Choice(names=tuple(map(str, names)), division=division, **more))


def asked(records: Sequence[Any]) -> list[str]:
    """The first text of each record."""
    return [record.messages[0].content for record in records]
