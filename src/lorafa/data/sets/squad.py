"""SQuAD (version 1.1): questions with the paragraph that has the answer in it.

Where people gave several answers, as in the held-out split, all of them are the answer, one after another.
"""

from __future__ import annotations

from typing import Any

from lorafa.data.cells import MEND, Row, parsed, text_of
from lorafa.data.records import Record
from lorafa.data.sets.prompts import pair
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings
from lorafa.errors import DataError


def _record(row: Row, place: str) -> Record | None:
    question, context = text_of(row, place, "question"), text_of(row, place, "context")
    answer = ", ".join(_answers(row, place))
    return pair(f"answer the question: {question}\ncontext: {context}\nresult: ", answer or None, place)


def _answers(row: Row, place: str) -> list[str]:
    """The texts of the column ``answers``; in a csv file it is JSON."""
    given: Any = row.get("answers")
    if isinstance(given, str):
        given = parsed(given, f"{place}, column 'answers'", MEND)
    texts = given.get("text") if isinstance(given, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: column 'answers' holds {given!r:.40}, expected {{'text': [...]}}. {MEND}")
    return texts


SQUAD = Published(
    hub="rajpurkar/squad",
    file="squad.jsonl",
    columns=("question", "context", "answers"),
    record=_record,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
