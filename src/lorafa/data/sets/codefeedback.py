"""Code-Feedback, filtered: instructions whose answer has code in it, cut after the first block of code."""

from __future__ import annotations

from lorafa.data.cells import Row, text_of
from lorafa.data.records import Record
from lorafa.data.sets.prompts import instructed, pair
from lorafa.data.sets.published import InOrder, Only, Published, PublishedSettings

FENCE = "```"
"""What stands before and after a block of code; one that is left open is closed where the answer ends."""


def _has_code(row: Row, place: str) -> bool:
    return FENCE in text_of(row, place, "answer")


def _record(row: Row, place: str) -> Record | None:
    before, _, rest = text_of(row, place, "answer").partition(FENCE)
    answer = before + FENCE + rest.partition(FENCE)[0] + FENCE
    return pair(instructed(text_of(row, place, "query")), answer, place)


CODEFEEDBACK = Published(
    hub="m-a-p/CodeFeedback-Filtered-Instruction",
    file="CodeFeedback-Filtered-Instruction.jsonl",
    columns=("query", "answer"),
    record=_record,
    heldout=InOrder(trained=100_000, heldout=10_000),
    only=Only(keeps=_has_code, called="with code", having=f"{FENCE} in its column 'answer'"),
).data_set(settings=PublishedSettings)
