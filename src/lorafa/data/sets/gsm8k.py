"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school problems with worked answers that end in ``#### N``."""

from __future__ import annotations

from lorafa.data.cells import Row, text_of
from lorafa.data.records import Record
from lorafa.data.sets.prompts import answer_of, asked, pair
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings


def _record(row: Row, place: str) -> Record | None:
    return pair(asked(text_of(row, place, "question")), answer_of(row, place, "answer"), place)


GSM8K = Published(
    hub="openai/gsm8k",
    subset="main",
    file="train.jsonl",
    columns=("question", "answer"),
    record=_record,
    heldout=OtherSplit("test"),
).data_set(settings=PublishedSettings)
