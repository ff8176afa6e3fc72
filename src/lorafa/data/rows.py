"""How a row of any accepted form becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lorafa.data.cells import MEND, Row, columns, given, label_of, text_of
from lorafa.data.numbers import only_number
from lorafa.data.records import Message, Record, final_answer
from lorafa.data.turns import history_of, system_of, tools_of, turns_of, with_system_of, writes_turns
from lorafa.errors import DataError, did_you_mean

Convert = Callable[[Row, str], Record]
"""(row, where it stands) -> the record."""


@dataclass(frozen=True)
class Form:
    """One way to write a row."""

    columns: tuple[str, ...]
    """A row that has all of them is of this form, unless it is of an earlier one."""
    convert: Convert
    words: str = ""
    """What it is called in messages, where that is not the columns."""

    def __str__(self) -> str:
        return self.words or " + ".join(self.columns)


@dataclass(frozen=True)
class Reading:
    """What rows are read for: the forms they may have."""

    name: str
    forms: tuple[Form, ...]
    takes_columns: bool = True
    """Whether two columns, a prompt and an answer, can be named in their place."""

    def __repr__(self) -> str:
        return self.name  # which tells it from others in fingerprints

    @property
    def accepted(self) -> str:
        """The forms in words."""
        return "; ".join(map(str, self.forms))


def converter(
    name: str, first: Row, prompt_column: str | None, completion_column: str | None, reading: Reading | None = None
) -> Convert:
    """How a row becomes a record, judged by the columns of the first one.

    Args:
        reading: what the rows are read for; None: answers to learn.
    """
    reading = ANSWERS if reading is None else reading
    if prompt_column is not None and completion_column is not None:
        if not reading.takes_columns:
            raise DataError(
                f"data.prompt_column and data.completion_column name a prompt and its one answer, and here the rows "
                f"are read as {reading.accepted}. Rename the columns of {name} in their place."
            )
        missing = [column for column in (prompt_column, completion_column) if column not in first]
        if missing:
            raise DataError(
                f"{name} has no column {missing[0]!r}.{did_you_mean(missing[0], first)} "
                f"Its columns are: {columns(first)}."
            )
        return partial(pair, prompt_column=prompt_column, completion_column=completion_column, answer_of=label_of)
    forms = reading.forms
    for at, form in enumerate(forms):
        if all(column in first for column in form.columns):
            return partial(_of_form, form=form, earlier=forms[:at]) if at else form.convert
    if "hypotheses" in first:
        raise DataError(
            f"{name} holds n-best lists (its columns are: {columns(first)}), which no kind of model trains on by "
            "itself. recipes/rescoring.py trains an encoder to choose among their hypotheses."
        )
    raise DataError(
        f"{name} has the columns {columns(first)}; accepted are: {reading.accepted}. Rename the columns"
        f"{', or name two of them with data.prompt_column and data.completion_column' * reading.takes_columns}."
    )


def _of_form(row: Row, place: str, form: Form, earlier: Sequence[Form]) -> Record:
    """The record of a row that is of no earlier form: where the first row was read by other columns, what it says
    would not be read."""
    for other in earlier:
        if all(given(row, column) is not None for column in other.columns):
            raise DataError(
                f"{place}: this row has {other}, where the first one has {form} and is read by that. Give all rows of "
                "a file the same columns."
            )
    return form.convert(row, place)


def pair(
    row: Row,
    place: str,
    prompt_column: str,
    completion_column: str,
    answer_of: Callable[[Row, str, str], str] = text_of,
) -> Record:
    """The record of a prompt and its answer: two texts, or two lists of messages."""
    named = (prompt_column, completion_column)
    beside = {column: row[column] for column in _BESIDE if column in row and column not in named}
    lists = [isinstance(row.get(column), list) for column in named]
    if any(lists) or all(writes_turns(row.get(column)) for column in named):
        return _pair_of_lists(row, beside, place, named, not any(lists) or all(lists))
    prompt, completion = text_of(row, place, prompt_column), answer_of(row, place, completion_column)
    if prompt_column == "instruction" and "input" not in named and given(row, "input") is not None:
        prompt = f"{prompt}\n\n{text_of(row, place, 'input')}"
    earlier = [*system_of(beside, place), *history_of(beside, place)]
    asked = (*earlier, Message("user", prompt), Message("assistant", completion))
    return record_of(asked, place, tools_of(beside, place))


def _pair_of_lists(row: Row, beside: Row, place: str, named: tuple[str, str], both: bool) -> Record:
    """Turns that are read and turns that follow them, of which the assistant's are trained."""
    if not both:
        raise DataError(
            f"{place}: of {named[0]!r} and {named[1]!r} one is a list of messages and one is not. Give two texts, or "
            "two lists."
        )
    read = [replace(turn, trained=False) for turn in turns_of(row, place, named[0])]
    answered = turns_of(row, place, named[1])
    if not any(turn.role == "assistant" for turn in answered):
        raise DataError(
            f"{place}: {named[1]!r} has no assistant turn, so there is nothing to learn from this row. Its roles are: "
            f"{', '.join(turn.role for turn in answered)}. {MEND}"
        )
    return _conversation(beside, place, named[0], [*read, *answered])


def turns(row: Row, place: str, column: str) -> Record:
    """The record of a conversation."""
    return _conversation(row, place, column, turns_of(row, place, column))


def _conversation(row: Row, place: str, column: str, turns: Sequence[Message]) -> Record:
    _refuse_beside(row, place, column, ("history", "chat_template_kwargs"))
    messages = with_system_of(row, place, column, list(turns))
    if not any(message.role == "assistant" and (message.content.strip() or message.extra) for message in messages):
        raise DataError(
            f"{place}: no assistant turn with text in it, so there is nothing to learn from this row. "
            f"Its roles are: {', '.join(message.role for message in messages)}. {MEND}"
        )
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and turn.trained and not turn.content.strip() and not turn.extra:
            raise DataError(
                f"{place}: message {number} is an answer without text, so that only its end would be trained. Give it "
                "one, or the weight 0 (then it is read and not trained), or delete the row."
            )
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise DataError(f"{place}: all assistant turns have the weight 0. There is nothing to learn. Delete the row.")
    return record_of(tuple(messages), place, tools_of(row, place))


def _plain(row: Row, place: str) -> Record:
    _refuse_beside(row, place, "text", _BESIDE)
    return Record((Message("assistant", text_of(row, place, "text")),), plain=True, place=place)


_BESIDE = ("system", "history", "tools", "chat_template_kwargs")
"""Columns that say more of a conversation."""
_WHY = {
    "history": "Earlier turns belong into {column!r} itself.",
    "chat_template_kwargs": "A chat template is given no settings here: write one that has them (data.template).",
}


def _refuse_beside(row: Row, place: str, column: str, names: Sequence[str]) -> None:
    """Raises DataError for a column that would not be read."""
    for name in names:
        if given(row, name) is not None:
            why = _WHY.get(name, "").format(column=column) if column != "text" else "A plain text is all there is."
            raise DataError(
                f"{place}: a column {name!r} beside {column!r}, which would not be read. {why} Take it out."
            )


FORMS = (
    Form(("messages",), partial(turns, column="messages")),
    Form(("prompt", "completion"), partial(pair, prompt_column="prompt", completion_column="completion")),
    Form(("question", "answer"), partial(pair, prompt_column="question", completion_column="answer")),
    Form(
        ("instruction", "output"),
        partial(pair, prompt_column="instruction", completion_column="output"),
        "instruction (+ input) + output",
    ),
    Form(("conversations",), partial(turns, column="conversations")),
    Form(("text",), _plain),
)
"""The accepted forms; a row is of the first whose columns it has."""
ANSWERS = Reading("answers", FORMS)
"""Rows with an answer to learn."""
ACCEPTED = ANSWERS.accepted


def record_of(messages: tuple[Message, ...], place: str, tools: tuple[Any, ...] = ()) -> Record:
    """The record of a conversation, with the answer it leads to where that has a number in it."""
    record = Record(messages, tools=tools, place=place)
    last = [message.content for message in messages if message.role == "assistant"][-1]
    answer = final_answer(last)
    if answer is None or only_number(answer) is None or not record.question:  # unasked, it cannot be graded
        return record
    return replace(record, answer=answer)
