"""MetaMathQA as the LoRA-GA and LoRA-One scripts train on it: its rows made from GSM8K, as "Q: ...", "A: ..." pairs.

The first 100,000 such rows are trained on and the next 10,000 held out, in the order of the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from lorafa.data.cells import Row
from lorafa.data.entry import DataSet, Wanted
from lorafa.data.files import read_rows
from lorafa.data.heldout import rows_of, without_heldout
from lorafa.data.hub import HubSettings, hub_rows
from lorafa.data.records import Message, Record, Records
from lorafa.data.rows import converter
from lorafa.errors import DataError, SourceError, first_line
from lorafa.storage.paths import user_path

HUB_ID = "meta-math/MetaMathQA"
FILE = "MetaMathQA-395K.json"
TRAINED, HELD_OUT = 100_000, 10_000
KIND, END = "GSM", "\nThe answer is:"
"""What the column ``type`` of a row has in it, and where the trained text ends."""


@dataclass(frozen=True, kw_only=True)
class MetaMathSettings:
    """Where the rows come from."""

    file: str | None = None
    """Local copy of the rows (.json or .jsonl); null fetches them from the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the Hub."""


def _load(wanted: Wanted, settings: MetaMathSettings) -> Records:
    source = settings.file or HUB_ID
    rows = _of_file(user_path(settings.file)) if settings.file else _of_hub(settings.revision)
    chosen = [(place, row) for place, row in rows if KIND in _type(row, place)]
    if not chosen:
        raise DataError(
            f"{source} holds no row of GSM8K: none of its {len(rows)} rows has {KIND} in its column 'type'. Give a "
            f"copy of {FILE}."
        )
    convert = converter(source, chosen[0][1], "query", "response")
    return _split([_as_published(convert(row, place)) for place, row in chosen], wanted, source)


def _of_file(path: Path) -> list[tuple[str, Row]]:
    if not os.path.isfile(path):
        raise SourceError(f"data.file={path} is no file. Give a copy of {FILE}, or leave it out to fetch {HUB_ID}.")
    return read_rows(path)


def _of_hub(revision: str | None) -> list[tuple[str, Row]]:
    try:
        return hub_rows(HUB_ID, HubSettings(revision=revision))
    except SourceError as error:
        cause = first_line(error.__cause__ or error)
        raise SourceError(
            f"Could not load {HUB_ID} from the Hub: {cause}. Next step: check the connection, or give a local copy, "
            f"data.file=<{FILE}>."
        ) from error


def _type(row: Row, place: str) -> str:
    found = row.get("type")
    if not isinstance(found, str):
        raise DataError(f"{place}: no text in the column 'type', by which rows are chosen. Give a copy of {FILE}.")
    return found


def _as_published(record: Record) -> Record:
    """The pair as the scripts write it; the final answer is that of the whole text."""
    question, response = (message.content for message in record.messages[-2:])
    answer = response.partition(END)[0]
    if not answer.strip():
        raise DataError(f"{record.place}: nothing stands before {END.strip()!r}. Mend or delete the row.")
    return replace(record, messages=(Message("user", f"Q: {question}\nA: "), Message("assistant", answer)))


def _split(records: list[Record], wanted: Wanted, source: str) -> Records:
    """Rows in the order of the file: those of the training, then the held-out ones; of fewer rows the same share."""
    count = len(records)
    share = min(HELD_OUT, count // (1 + TRAINED // HELD_OUT)) or int(count > 1)
    held = share if wanted.eval_size is None else rows_of(wanted.eval_size, count)
    first = min(TRAINED, count - held)
    heldout = records[max(first, 0) :][:held]
    rest = without_heldout(records[: max(first, 0)], heldout)
    asked = 1 if wanted.train_size is None else wanted.train_size
    if len(heldout) < held or len(rest) < asked:
        raise DataError(
            f"{source} holds {count} rows of GSM8K, of which the first {max(first, 0)} may be trained on "
            f"({max(first, 0) - len(rest)} of them repeat a held-out question), asked for {held} to evaluate and "
            f"{asked} to train on. Lower data.eval_size or data.train_size."
        )
    return Records(rest[: wanted.train_size], heldout, source, max(first, 0) - len(rest))


META_MATH = DataSet(load=_load, settings=MetaMathSettings, counts=True)
