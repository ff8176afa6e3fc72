"""A conversation with several speakers at once, of which each remembers its own answers."""

from __future__ import annotations

from collections.abc import Mapping

from lorafa.data.records import Message


class Conversation:
    """What was said: the system prompt, and for each speaker the questions it was asked with its own answers."""

    def __init__(self, system: str | None = None) -> None:
        self._system = system
        self._turns: dict[str, list[Message]] = {}
        self.asked = 0
        """Questions that were answered since it began."""

    @property
    def system(self) -> str | None:
        """The system prompt; None where there is none."""
        return self._system

    def reset(self, system: str | None) -> None:
        """Begin anew, with this system prompt."""
        self._system, self._turns, self.asked = system, {}, 0

    def messages(self, name: str, question: str) -> tuple[Message, ...]:
        """What the speaker of that name is asked with."""
        first = () if self._system is None else (Message("system", self._system),)
        return (*first, *self._turns.get(name, ()), Message("user", question))

    def add(self, question: str, answers: Mapping[str, str]) -> None:
        """Remember a question with the answer of each speaker that was asked; an empty answer is one too."""
        for name, answer in answers.items():
            self._turns.setdefault(name, []).extend((Message("user", question), Message("assistant", answer)))
        self.asked += 1
