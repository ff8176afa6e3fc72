"""How the rows of published data sets become texts: x, which is asked, and y, which is trained.

The words are those of the scripts of LoRA-GA (arXiv:2407.05000), which LoRA-One (arXiv:2502.01235) has taken over, so
that figures can be compared. They write x, a space, y and the end: ``data.template=spaced``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from lorafa.data.cells import Row, checked, columns, given, text_of
from lorafa.data.records import Message, Record
from lorafa.data.rows import record_of
from lorafa.errors import DataError

ToRecord = Callable[[Row, str], Record | None]
"""(row, where it stands) -> its record; None where there is nothing to learn from it, because its answer is blank."""

LABEL = "label"
"""The column of a class."""

_ASKED = re.compile(r"Q: (.*)\nA: ?", flags=re.DOTALL)

_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def asked(question: str) -> str:
    """A question of mathematics."""
    return f"Q: {question}\nA: "


def question_of(text: str) -> str:
    """The question in a text that may be what :func:`asked` has made of it."""
    found = _ASKED.fullmatch(text)
    return found[1] if found else text


def instructed(instruction: str, context: str | None = None) -> str:
    """An instruction as Alpaca writes it; what it is about stands below it, and then no sentence above."""
    if context is None:
        return f"{_TASK}### Instruction:\n{instruction}\n\n### Response:\n"
    return f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"


def pair(prompt: str, answer: str | None, place: str) -> Record | None:
    """The record of a prompt and its answer."""
    if answer is None:
        return None
    return record_of((Message("user", prompt), Message("assistant", answer)), place)


def instructions(prompt: str, answer: str) -> ToRecord:
    """Rows of an instruction and an answer, in columns of these names."""

    def convert(row: Row, place: str) -> Record | None:
        return pair(instructed(text_of(row, place, prompt)), answer_of(row, place, answer), place)

    return convert


def alpaca(row: Row, place: str) -> Record | None:
    """A row of ``instruction``, ``output``, and ``input`` if there is one."""
    there = str(given(row, "input") or "").strip()
    context = text_of(row, place, "input") if there else None
    return pair(instructed(text_of(row, place, "instruction"), context), answer_of(row, place, "output"), place)


def classified(instruction: str, texts: Sequence[str], words: Sequence[str]) -> ToRecord:
    """Rows of a class: an instruction, the texts in their columns, and the word of the class as the answer.

    Args:
        words: of the classes 0, 1, 2 ...
    """

    def convert(row: Row, place: str) -> Record | None:
        read = "\n".join(cell(row, place, column) for column in texts)
        return pair(f"{instruction}: {read}\nresult: ", label_of(row, place, words), place)

    return convert


def label_of(row: Row, place: str, words: Sequence[str]) -> str:
    """The word of a row's class, which is given by its number, as text too, or by the word itself.

    Raises:
        DataError: it is none of them; -1 stands where the class is kept secret.
    """
    known: Mapping[str, str] = {**{str(number): word for number, word in enumerate(words)}, **{w: w for w in words}}
    value = _value(row, place, LABEL)
    word = known.get(str(value).strip()) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    if word is None:
        listed = ", ".join(f"{number} ({word})" for number, word in enumerate(words))
        secret = " It stands for a class that is not told, as in a test split." if str(value) == "-1" else ""
        raise DataError(
            f"{place}: column {LABEL!r} holds {value!r:.40}.{secret} Known are {listed}, by number or by word. Mend or "
            "delete the row, or give another file or split."
        )
    return word


def cell(row: Row, place: str, column: str) -> str:
    """The text in a column that is read and not trained: it may be blank, as some in QQP are.

    Raises:
        DataError: it is no text.
    """
    value = _value(row, place, column)
    return checked(value, place) if isinstance(value, str) else text_of(row, place, column)


def answer_of(row: Row, place: str, column: str) -> str | None:
    """The text in a column that is trained; None where it is blank.

    Raises:
        DataError: it is no text.
    """
    value = _value(row, place, column)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return None if blank else text_of(row, place, column)


def _value(row: Row, place: str, column: str) -> object:
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; this row has {columns(row)}. Give every row the same columns.")
    return row[column]
