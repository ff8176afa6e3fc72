"""MetaMathQA as the LoRA-GA and LoRA-One scripts train on it: its rows made from GSM8K, as "Q: ...", "A: ..." pairs.

The first 100,000 such rows are trained on and the next 10,000 held out, in the order of the file.
"""

from __future__ import annotations

from dataclasses import replace

from lorafa.data.cells import MEND, Row, text_of
from lorafa.data.records import Message, Record
from lorafa.data.rows import record_of
from lorafa.data.sets.prompts import asked
from lorafa.data.sets.published import InOrder, Only, Published, PublishedSettings
from lorafa.errors import DataError

FILE = "MetaMathQA-395K.json"
KIND, END = "GSM", "\nThe answer is:"
"""What the column ``type`` of a row has in it, and where the trained text ends."""


def _of_gsm8k(row: Row, place: str) -> bool:
    found = row.get("type")
    if not isinstance(found, str):
        raise DataError(f"{place}: no text in the column 'type', by which rows are chosen. Give a copy of {FILE}.")
    return KIND in found


def _record(row: Row, place: str) -> Record:
    """The pair as the scripts write it; the final answer is that of the whole text."""
    prompt = Message("user", asked(text_of(row, place, "query")))
    response = text_of(row, place, "response")
    answer = response.partition(END)[0]
    if not answer.strip():
        raise DataError(f"{place}: nothing stands before {END.strip()!r}. {MEND}")
    whole = record_of((prompt, Message("assistant", response)), place)
    return replace(whole, messages=(prompt, Message("assistant", answer)))


PUBLISHED = Published(
    hub="meta-math/MetaMathQA",
    file=FILE,
    columns=("query", "response"),
    record=_record,
    heldout=InOrder(trained=100_000, heldout=10_000),
    only=Only(keeps=_of_gsm8k, called="of GSM8K", having=f"{KIND} in its column 'type'"),
)

META_MATH = PUBLISHED.data_set(settings=PublishedSettings)
