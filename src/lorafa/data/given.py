"""What a chat template leaves out of a conversation, or changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lorafa.data.records import Message
from lorafa.data.rendering import HOLE, dense
from lorafa.errors import DataError

WORDS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""What an assistant says beside the content."""

CUT = (
    "the chat template leaves out {}, so it would not be trained. Use a template that writes it (data.template, "
    "tokenizer.chat_template), take it out of the row, or give the turn the weight 0."
)


class Refused(Exception):
    """A turn cannot be told from the rest, or is not all there."""


class Renders(Protocol):
    """What writes a conversation as text."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any], /) -> str: ...


def changed_words(message: Message, words: str) -> list[str]:
    """What differs between the words given and those written.

    Raises:
        Refused: a part of them is gone.
    """
    if dense(message.content) not in dense(words):
        raise Refused(CUT.format("a part of the assistant's text"))
    for name in WORDS:
        if not all(_holds(words, part) for part in _parts(message.extra.get(name))):
            raise Refused(CUT.format(f"the assistant's {name}"))
    return [] if message.content in words else ["have blanks in or around an answer that the template changes"]


class LeftOut:
    """What is given to be read and a template does not write."""

    def __init__(self, text: Renders) -> None:
        self._text = text
        self._shapes: dict[Any, tuple[str, ...]] = {}

    def in_text(self, messages: Sequence[Message], tools: Sequence[Any], text: str) -> list[str]:
        """What is given to be read and is not in the text."""
        cut = [f"a text of the role {m.role}" for m in messages if not _holds(text, m.content)]
        missing = (*cut, *self._unwritten(messages, tools))
        return [f"have {what}, of which the chat template leaves out a part or all" for what in missing]

    def _unwritten(self, messages: Sequence[Message], tools: Sequence[Any]) -> tuple[str, ...]:
        """What the template passes over in conversations of this shape, whatever the texts are."""
        shape = (tuple((m.role, tuple(sorted(m.extra)), bool(m.content)) for m in messages), bool(tools))
        if shape not in self._shapes:
            self._shapes[shape] = tuple(dict.fromkeys(self._find_unwritten(messages, tools)))
        return self._shapes[shape]

    def _find_unwritten(self, messages: Sequence[Message], tools: Sequence[Any]) -> Iterable[str]:
        holes = [replace(m, content=m.content and f"{HOLE}{n}{HOLE}") for n, m in enumerate(messages)]
        try:
            whole = self._text(holes, tools)
        except DataError:  # it reads contents
            return
        for number, message in enumerate(holes):
            if message.content not in whole:
                yield f"a text of the role {message.role}"
            for name in message.extra:
                rest = {key: value for key, value in message.extra.items() if key != name}
                others = [*holes[:number], replace(message, extra=rest), *holes[number + 1 :]]
                if self._same(others, tools, whole):
                    yield f"{name} (role {message.role})"
        if tools and self._same(holes, (), whole):
            yield "tools"

    def _same(self, messages: Sequence[Message], tools: Sequence[Any], text: str) -> bool:
        try:
            return self._text(messages, tools) == text
        except DataError:
            return False


def _parts(value: Any) -> Iterable[str]:
    """The texts of what an assistant says beside the content: of a call the name and the arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        called = value.get("function", value)
        inside = [called.get("name"), called.get("arguments")] if isinstance(called, Mapping) else [called]
        yield from (part for one in inside for part in _leaves(one))
    elif isinstance(value, list | tuple):
        yield from (part for inner in value for part in _parts(inner))


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (part for pair in value.items() for one in pair for part in _leaves(one))
    elif isinstance(value, list | tuple):
        yield from (part for inner in value for part in _leaves(inner))


def _holds(words: str, part: str) -> bool:
    """Whether the part stands there, as it is or as JSON writes it; blanks aside."""
    if part in words:
        return True
    written, whole = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]), dense(words)
    return any(dense(one) in whole for one in written)
