"""Conversations that wait for an answer: the prompts of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorafa.data.cells import Row, checked, columns, given, text_of
from lorafa.data.files import read_rows
from lorafa.data.records import Message
from lorafa.data.turns import history_of, system_of, tools_of, turns_of, with_system_of, writes_turns
from lorafa.errors import DataError, SourceError
from lorafa.storage.paths import user_path

TEXT = ".txt"
"""The ending of a file with a prompt on each line."""
ASKS = ("user", "tool", "function", "ipython")
"""Who speaks before an answer."""


@dataclass(frozen=True)
class Unanswered:
    """A conversation that ends before an answer."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    place: str = ""
    """Where it stands, for messages."""

    def plain(self) -> dict[str, Any]:
        """The same as JSON has it: ``prompt`` where one user's turn is all, else ``messages``."""
        if len(self.messages) == 1 and self.messages[0].role == "user" and not self.messages[0].extra:
            return {"prompt": self.messages[0].content}
        turns = [{"role": one.role, "content": one.content, **one.extra} for one in self.messages]
        return {"messages": turns, **({"tools": list(self.tools)} if self.tools else {})}


def prompts_of(name: str) -> list[Unanswered]:
    """The prompts of a file: the lines of a .txt, or rows with ``messages``, ``prompt``, ``question`` or
    ``instruction`` (and ``input``), whatever else they have.

    Raises:
        SourceError: the file cannot be read.
        DataError: it holds none, or one is empty or waits for no answer; it is named by its place.
    """
    whole = name.lower().endswith(TEXT)
    found = _lines(name) if whole else [prompt_of(row, place) for place, row in read_rows(user_path(name))]
    if not found:
        raise DataError(f"{name} holds no prompts. Give one a line, or rows with {', '.join(_WAYS)}.")
    return found


def _lines(name: str) -> list[Unanswered]:
    try:
        text = user_path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}. Convert it.") from error
    except OSError as error:
        raise SourceError(f"{name} cannot be read: {error.strerror or error}. Check the path.") from error
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        place = f"{name}, line {number}"
        if not line.strip():
            raise DataError(f"{place}: the prompt is empty, so there is nothing to answer. Delete the line.")
        found.append(Unanswered((Message("user", checked(line.rstrip("\r"), place)),), place=place))
    return found


def prompt_of(row: Row, place: str) -> Unanswered:
    """The prompt in a row.

    Raises:
        DataError: it has none, or one that is empty or waits for no answer.
    """
    way = next((column for column in _WAYS if column in row), None)
    if way is None:
        raise DataError(f"{place}: no column of {', '.join(_WAYS)}; this row has {columns(row)}. Rename one.")
    messages = tuple(_WAYS[way](row, place, way))
    if messages[-1].role not in ASKS:
        raise DataError(
            f"{place}: {way!r} ends with a turn of the role {messages[-1].role}, and is to end with a user's. Take the "
            "answer out."
        )
    if not messages[-1].content.strip():
        raise DataError(f"{place}: the prompt is empty, so there is nothing to answer. Delete the row.")
    return Unanswered(messages, tools_of(row, place), place)


def _turns(row: Row, place: str, column: str) -> list[Message]:
    return with_system_of(row, place, column, turns_of(row, place, column))


def _text(row: Row, place: str, column: str) -> list[Message]:
    if isinstance(row[column], list) or writes_turns(row[column]):
        return _turns(row, place, column)
    return [*system_of(row, place), *history_of(row, place), Message("user", text_of(row, place, column))]


def _instruction(row: Row, place: str, column: str) -> list[Message]:
    *before, asked = _text(row, place, column)
    if given(row, "input") is None:
        return [*before, asked]
    return [*before, Message("user", f"{asked.content}\n\n{text_of(row, place, 'input')}")]


_WAYS: dict[str, Callable[[Row, str, str], list[Message]]] = {
    "messages": _turns, "prompt": _text, "question": _text, "instruction": _instruction,
}  # fmt: skip
"""The columns a prompt may stand in, the first that a row has, and how it is read."""
