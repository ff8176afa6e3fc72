"""The turns of a conversation, as the messages of chat templates or as ShareGPT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorafa.data.cells import MEND, Row, all_checked, checked, given, listed, parsed, text_of
from lorafa.data.records import ROLES, Message
from lorafa.errors import DataError

SPEAKERS: Mapping[str, str] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **{role: role for role in ("system", "developer", "function", "ipython")},
}
"""Who speaks, by the name ShareGPT's ``from`` has for it -> the role."""
CALLS = ("function_call", "tool_call")
"""Names in ``from`` of the assistant's turns that call functions and say nothing else."""

_EMPTY: tuple[Any, ...] = ("", [], {})


def turns_of(row: Row, place: str, column: str) -> list[Message]:
    """The turns in a column: objects with ``role`` and ``content``, or with ``from`` and ``value``."""
    turns = listed(row.get(column), place, column)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f'{place}: {column!r} must be a list of {{"role": ..., "content": ...}}, found {turns!r:.60}. {MEND}'
        )
    return [_turn(turn, number, place) for number, turn in enumerate(turns, 1)]


def writes_turns(value: Any) -> bool:
    """Whether a text is a list of turns in JSON, as cells of a csv file have it, and no text of its own."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return False
    names = ({"role", "content"}, {"from", "value"})
    return turns != [] and all(isinstance(turn, dict) and any(pair <= turn.keys() for pair in names) for turn in turns)


def system_of(row: Row, place: str) -> list[Message]:
    """The system turn of a row with such a column."""
    return [Message("system", text_of(row, place, "system"))] if given(row, "system") is not None else []


def with_system_of(row: Row, place: str, column: str, turns: list[Message]) -> list[Message]:
    """The turns of a column behind the system turn of a row that has such a column."""
    system = system_of(row, place)
    if system and any(message.role == "system" for message in turns):
        raise DataError(f"{place}: a column 'system' and a system turn in {column!r}. Keep one of the two.")
    return [*system, *turns]


def history_of(row: Row, place: str) -> list[Message]:
    """Earlier turns, given as pairs of a question and its answer; these answers are read and not trained."""
    turns: list[Message] = []
    found = given(row, "history")
    pairs = [] if found is None else listed(found, place, "history")
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"{place}: 'history' must be a list of pairs, a question and its answer as text, found {pair!r:.60}. "
                f"{MEND}"
            )
        question, answer = (checked(text, place) for text in pair)
        turns += [Message("user", question), Message("assistant", answer, trained=False)]
    return turns


def tools_of(row: Row, place: str) -> tuple[Any, ...]:
    """The column ``tools``: a list of objects, or that as JSON."""
    found = given(row, "tools")
    if found is None:
        return ()
    tools = parsed(found, f"{place}, column 'tools'", MEND) if isinstance(found, str) else found
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: 'tools' must be a list of objects, found {found!r:.60}. {MEND}")
    return tuple(all_checked(tools, place))


def _turn(turn: Any, number: int, place: str) -> Message:
    """One turn: what it has beside who speaks, the text and a weight is for the chat template."""
    found = {} if not isinstance(turn, dict) else {key: value for key, value in turn.items() if value is not None}
    if "from" in found or "value" in found:
        found = _translated(found, number, place)
    role, weight = found.pop("role", None), found.pop("weight", 1)
    content = found.pop("content", "" if found.get("tool_calls") else None)
    content = _joined(content, number, place)
    extra = all_checked({key: value for key, value in found.items() if value not in _EMPTY}, place)
    if content is None or role not in ROLES:
        raise DataError(
            f"{place}: message {number} needs a role ({', '.join(ROLES)}) and a content that is text, "
            f"found {turn!r:.80}. {MEND}"
        )
    if weight not in (0, 1):
        raise DataError(
            f"{place}: message {number} has the weight {weight!r:.20}. Give 0 for a turn that is only read, else 1."
        )
    return Message(role, checked(content, place), extra, trained=bool(weight))


def _translated(found: Mapping[str, Any], number: int, place: str) -> dict[str, Any]:
    """A turn as ShareGPT writes it, as a message; what else it has is kept."""
    speaker, value = found.get("from"), found.get("value")
    rest = {key: inner for key, inner in found.items() if key not in ("from", "value")}
    if both := [name for name in ("role", "content") if name in rest]:
        raise DataError(
            f"{place}: message {number} has both {both[0]!r} and 'from' with 'value'. Keep one way to write it."
        )
    if speaker in CALLS:
        return {**rest, "role": "assistant", "tool_calls": _calls(value, number, place)}
    if not isinstance(speaker, str) or speaker not in SPEAKERS or value is None:
        raise DataError(
            f"{place}: message {number} needs a 'from' ({', '.join((*SPEAKERS, *CALLS))}) and a 'value' that is text, "
            f"found {dict(found)!r:.80}. {MEND}"
        )
    return {**rest, "role": SPEAKERS[speaker], "content": value}


def _calls(value: Any, number: int, place: str) -> list[dict[str, Any]]:
    """Function calls, which ShareGPT writes as JSON: an object with a name and arguments, or a list of them."""
    where, advice = f"{place}, message {number}", 'Write {"name": ..., "arguments": {...}}, or delete the row.'
    calls = parsed(value, where, advice) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls or [None]:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["name"], str):
            raise DataError(
                f"{where}: a call needs a name and arguments and nothing else, found {call!r:.60}. {advice}"
            )
    return [{"type": "function", "function": call} for call in calls]


def _joined(content: Any, number: int, place: str) -> str | None:
    """The text of a content, which may be a list of parts; None where it is none."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{place}: message {number} has a part that is no text: {part!r:.60}. Only parts of the type text are "
                f"read. {MEND}"
            )
    return "".join(part["text"] for part in content)
