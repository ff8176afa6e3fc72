"""COPA of SuperGLUE: which of two choices is the cause or the effect of a premise, as text to text.

LoRA-GA does not have it, and LoRA-One's words were not at hand: these are ours, in the form that GLUE has.
"""

from __future__ import annotations

from lorafa.data.cells import Row, text_of
from lorafa.data.records import Record
from lorafa.data.sets.prompts import LABEL, label_of, pair
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings


def _record(row: Row, place: str) -> Record | None:
    premise, first, second, what = (
        text_of(row, place, column) for column in ("premise", "choice1", "choice2", "question")
    )
    prompt = f"choose the {what} of the premise: {premise}\nchoice1: {first}\nchoice2: {second}\nresult: "
    return pair(prompt, label_of(row, place, ("choice1", "choice2")), place)


COPA = Published(
    hub="aps/super_glue",
    subset="copa",
    file="copa.jsonl",
    columns=("premise", "choice1", "choice2", "question", LABEL),
    record=_record,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
