"""The rows every source is turned into: a conversation, and the gold answer where the task has one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
"""The roles a turn can have; those after the first three where the chat template takes them."""

_MARK = re.compile(r"####|the (?:final )?answer is\b:?", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """One turn; ``role`` is one of ``ROLES``."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What chat templates read beside the content: reasoning_content, tool_calls, tool_call_id, name ..."""
    trained: bool = field(default=True, compare=False)
    """Whether an assistant's turn is trained, or only read (``"weight": 0``)."""


@dataclass(frozen=True)
class Record:
    """A conversation with at least one assistant turn, and the final answer it leads to (None: the task has none)."""

    messages: tuple[Message, ...]
    answer: str | None = None
    tools: tuple[Any, ...] = field(default=(), hash=False)
    """Descriptions of the functions that may be called, as chat templates read them."""
    place: str = field(default="", compare=False)
    """Where the row stands, for messages: "rows.jsonl, line 3"."""
    plain: bool = False
    """Whether its one turn is a text of its own: written without a chat template, and trained whole."""
    rejected: tuple[Message, ...] = ()
    """The turns of a worse answer to the same question; none where the row has one answer."""
    desirable: bool | None = None
    """Whether the answer is a good one, where the row says so."""

    @property
    def question(self) -> tuple[Message, ...]:
        """The turns before the last assistant turn: what a model is asked at evaluation."""
        last = max(i for i, message in enumerate(self.messages) if message.role == "assistant")
        return self.messages[:last]


@dataclass(frozen=True)
class Records:
    """Rows to train on and rows held out; no held-out question occurs in ``train``.

    ``repeated`` counts training rows that were left out because their question was held out.
    """

    train: list[Record]
    heldout: list[Record]
    source: str
    repeated: int = 0


def final_answer(text: str) -> str | None:
    """What stands after the last ``####`` or "The answer is": its line, or the next one that is not blank. A mark that
    nothing follows is passed over."""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in reversed(list(zip(marks, ends, strict=False))):  # without a mark there is an end all the same
        if lines := text[mark.end() : end].strip().splitlines():
            return lines[0].strip()
    return None
