"""How a row of any accepted kind becomes a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lorafa.data.records import ROLES, Message, Record, final_answer, last_number
from lorafa.errors import DataError, did_you_mean, first_line, shorten

ACCEPTED = "messages; prompt + completion; question + answer; instruction (+ input) + output"
"""Sets of columns; ``system`` may stand beside each, ``history`` beside pairs, ``tools`` beside messages."""

_PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))

Row = Mapping[str, Any]


def converter(
    name: str, first: Row, prompt_column: str | None, completion_column: str | None
) -> Callable[[Row, str], Record]:
    """How a row becomes a record, judged by the columns of the first one."""
    if prompt_column is not None and completion_column is not None:
        missing = [column for column in (prompt_column, completion_column) if column not in first]
        if missing:
            raise DataError(
                f"{name} has no column {missing[0]!r}.{did_you_mean(missing[0], first)} "
                f"Its columns are: {_columns(first)}."
            )
        return lambda row, place: _pair(row, place, prompt_column, completion_column)
    if "messages" in first:
        return _conversation
    for prompt, completion in _PAIRS:
        if prompt in first and completion in first:
            return lambda row, place: _pair(row, place, prompt, completion)
    raise DataError(
        f"{name} has the columns {_columns(first)}; accepted are: {ACCEPTED}. "
        "Rename the columns, or name two of them with data.prompt_column and data.completion_column."
    )


def _columns(row: Row) -> str:
    return shorten((f"{column!s:.40}" for column in row), 10) or "(none)"


def _pair(row: Row, place: str, prompt_column: str, completion_column: str) -> Record:
    prompt, completion = _text(row, place, prompt_column), _text(row, place, completion_column)
    if prompt_column == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{_text(row, place, 'input')}"
    named = (prompt_column, completion_column)
    system = _system(row, place) if "system" not in named else ()
    history = _history(row, place) if "history" not in named else ()
    return _record((*system, *history, Message("user", prompt), Message("assistant", completion)), place)


def _system(row: Row, place: str) -> tuple[Message, ...]:
    """The system turn of a row with such a column."""
    return (Message("system", _text(row, place, "system")),) if row.get("system") else ()


def _history(row: Row, place: str) -> tuple[Message, ...]:
    """Earlier turns, given as pairs of a question and its answer; these answers are read and not trained."""
    turns: list[Message] = []
    pairs = row.get("history") or []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"{place}: 'history' must be a list of pairs, a question and its answer as text, found {pair!r:.60}. "
                "Mend or delete the row."
            )
        question, answer = (_checked(text, place) for text in pair)
        turns += [Message("user", question), Message("assistant", answer, trained=False)]
    return tuple(turns)


def _text(row: Row, place: str, column: str) -> str:
    if column not in row:
        raise DataError(
            f"{place}: no column {column!r}; this row has {_columns(row)}. Give every row the same columns."
        )
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else repr(value)[:40]
        raise DataError(f"{place}: column {column!r} holds {found}, expected text. Mend or delete the row.")
    return _checked(value, place)


def _checked(text: str, place: str) -> str:
    """The text itself, unless it holds half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {text[error.start]!r} at character {error.start + 1} is half a character (a lone surrogate). "
            "Mend or delete the row."
        ) from error
    return text


def _conversation(row: Row, place: str) -> Record:
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f'{place}: \'messages\' must be a list of {{"role": ..., "content": ...}}, found {turns!r:.60}.'
        )
    messages = [_turn(turn, number, place) for number, turn in enumerate(turns, 1)]
    if system := _system(row, place):
        if any(message.role == "system" for message in messages):
            raise DataError(f"{place}: a column 'system' and a system turn in 'messages'. Keep one of the two.")
        messages = [*system, *messages]
    if not any(message.role == "assistant" and (message.content.strip() or message.extra) for message in messages):
        raise DataError(
            f"{place}: no assistant turn with text in it, so there is nothing to learn from this row. "
            f"Its roles are: {', '.join(message.role for message in messages)}."
        )
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise DataError(f"{place}: all assistant turns have the weight 0. There is nothing to learn. Delete the row.")
    return _record(tuple(messages), place, _tools(row, place))


def _turn(turn: Any, number: int, place: str) -> Message:
    """One entry of ``messages``: what it has beside role, content and weight is for the chat template."""
    given = {} if not isinstance(turn, dict) else {key: value for key, value in turn.items() if value is not None}
    role, weight = given.pop("role", None), given.pop("weight", 1)
    content = given.pop("content", "" if given.get("tool_calls") else None)
    content = _joined(content, number, place)
    extra = {key: _all_checked(value, place) for key, value in given.items() if value not in _EMPTY}
    if content is None or role not in ROLES:
        raise DataError(
            f"{place}: message {number} needs a role ({', '.join(ROLES)}) and a content that is text, "
            f"found {turn!r:.80}."
        )
    if weight not in (0, 1):
        raise DataError(
            f"{place}: message {number} has the weight {weight!r:.20}. Give 0 for a turn that is only read, else 1."
        )
    return Message(role, _checked(content, place), extra, trained=bool(weight))


_EMPTY: tuple[Any, ...] = ("", [], {})


def _joined(content: Any, number: int, place: str) -> str | None:
    """The text of a content, which may be a list of parts; None where it is none."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{place}: message {number} has a part that is no text: {part!r:.60}. Only parts of the type text are "
                "read. Mend or delete the row."
            )
    return "".join(part["text"] for part in content)


def _all_checked(value: Any, place: str) -> Any:
    """The value, all texts in it checked."""
    if isinstance(value, str):
        return _checked(value, place)
    if isinstance(value, dict):
        return {key: _all_checked(inner, place) for key, inner in value.items()}
    return [_all_checked(inner, place) for inner in value] if isinstance(value, list) else value


def _tools(row: Row, place: str) -> tuple[Any, ...]:
    """The column ``tools``: a list of objects, or that as JSON."""
    given = row.get("tools") or []
    tools = parsed(given, f"{place}, column 'tools'", "Mend or delete the row.") if isinstance(given, str) else given
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: 'tools' must be a list of objects, found {given!r:.60}. Mend or delete the row.")
    return tuple(_all_checked(tools, place))


def _record(messages: tuple[Message, ...], place: str, tools: tuple[Any, ...] = ()) -> Record:
    record = Record(messages, tools=tools, place=place)
    last = [message.content for message in messages if message.role == "assistant"][-1]
    answer = final_answer(last)
    if answer is None or last_number(answer) is None or not record.question:  # unasked, it cannot be graded
        return record
    return replace(record, answer=answer)


def parsed(text: str, place: str, advice: str) -> Any:
    """The value that JSON text has; ``advice`` says what to do where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 30, 0) : error.pos + 30]
        raise DataError(
            f"{place}: not valid JSON: {error.msg} at character {error.pos + 1}, near {near!r}. {advice}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"{place}: cannot be read: {first_line(error)}. {advice}") from error
