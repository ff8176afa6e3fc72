"""FLAN v2: tasks of many kinds, asked without a word around them; the first 110,000 rows are read."""

from __future__ import annotations

from lorafa.data.cells import Row, text_of
from lorafa.data.records import Record
from lorafa.data.sets.prompts import answer_of, pair
from lorafa.data.sets.published import InOrder, Published, PublishedSettings


def _record(row: Row, place: str) -> Record | None:
    return pair(text_of(row, place, "inputs"), answer_of(row, place, "targets"), place)


FLAN_V2 = Published(
    hub="SirNeural/flan_v2",
    file="flan_v2.jsonl",
    columns=("inputs", "targets"),
    record=_record,
    heldout=InOrder(trained=100_000, heldout=10_000),
    streamed=True,
).data_set(settings=PublishedSettings)
