"""A conversation as text, cut into what is read and what the assistant says.

The text is cut at each of the assistant's turns: after what the model is asked with, and after the token with which
the turn ends. Each stretch is tokenized apart, in training and at evaluation, so no token lies across a cut, and what
is asked is what preceded the answer in training, id by id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorafa.data.given import LeftOut, Refused, changed_words
from lorafa.data.records import Message
from lorafa.data.rendering import CLOSE, HOLE, OPEN, added_tokens, any_of, render, special_tokens, unmarked
from lorafa.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Stretch:
    """A part of the text that is tokenized apart."""

    text: str
    turn: int | None = None
    """Number of the message whose words these are, their end included; None: only read."""
    end: int | None = None
    """The token the turn ends with."""
    added: bool = False
    """Whether the template writes no such token there, so that it has to be put after the text."""


@dataclass(frozen=True)
class Written:
    """A conversation as text, cut."""

    stretches: list[Stretch]
    refused: dict[int, str]
    """Assistant turns that cannot be trained, by the number of the message; each with the reason."""
    said: list[str]
    """What differs from the text that was given, in a way that stops no training."""


@dataclass(frozen=True)
class _Turn:
    """Where a turn of the assistant stands in the text: its words and its end are [start, stop)."""

    start: int
    stop: int
    end: int
    added: bool


class Writer:
    """A tokenizer's chat template, and where in what it writes the turns are. Made once for many conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._added = added_tokens(tokenizer)
        self._swallowing = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        """Tokens that take the blanks after them."""
        self._missing = LeftOut(self._text)
        self._between = ""
        """What the template writes before an answer and after what it asks with."""
        self._header = ""
        """What it adds where it asks for an answer."""
        special = special_tokens(tokenizer)
        self._special = any_of(special)
        """Tokens that no text can have."""
        self._special = any_of(special | self._end_by_template())

    def write(self, messages: Sequence[Message], tools: Sequence[Any]) -> Written:
        """Cut a conversation, and say what of it the template changes or leaves out.

        Raises:
            DataError: the template refuses the conversation, or changes a text that spells a special token.
        """
        spelled: list[str] = []
        marked = [self._marked_message(message, spelled) for message in messages]
        marked_tools = self._marked(list(tools), spelled)
        written = self._cut(marked, marked_tools)
        text = "".join(stretch.text for stretch in written.stretches)
        said = [*written.said, *self._missing.in_text(marked, marked_tools, text)]
        if spelled:
            if unmarked(text) != self._text(messages, tools):
                raise DataError(
                    f"The chat template changes a text that spells the special token {spelled[0]!r}, so it cannot be "
                    "kept apart from the token. Write that text in another way."
                )
            said.append("spell a special token in a text, which stays text and does not act as the token")
        return replace(written, said=said)

    def ask(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[Stretch]:
        """What precedes the answer to a conversation, cut as in :meth:`write`.

        Raises:
            DataError: the template refuses the conversation, or has no place for an answer.
        """
        marked = [self._marked_message(message, []) for message in messages]
        some_answer = Message("assistant", f"{HOLE}?")  # another than the hole, by which the end of a text is found
        written = self._cut([*marked, some_answer], self._marked(list(tools), []))
        if len(marked) in written.refused:
            raise DataError(f"This cannot be asked: {written.refused[len(marked)]}")
        answer = next(i for i, stretch in enumerate(written.stretches) if stretch.turn == len(marked))
        return written.stretches[:answer]

    def _cut(self, messages: Sequence[Message], tools: Sequence[Any]) -> Written:
        text = self._text(messages, tools)
        stretches: list[Stretch] = []
        refused: dict[int, str] = {}
        said: list[str] = []
        at = 0
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            try:
                turn = self._turn(messages, number, tools, text)
                said += changed_words(message, text[turn.start : turn.stop])
            except (Refused, DataError) as error:
                refused[number] = str(error)
                continue
            stretches.append(Stretch(text[at : turn.start]))
            stretches.append(Stretch(text[turn.start : turn.stop], number, turn.end, turn.added))
            at = turn.stop
        return Written([*stretches, Stretch(text[at:])], refused, said)

    def _text(self, messages: Sequence[Message], tools: Sequence[Any], *, asks: bool = False) -> str:
        return render(messages, self.tokenizer, add_generation_prompt=asks, tools=tools)

    def _turn(self, messages: Sequence[Message], number: int, tools: Sequence[Any], text: str) -> _Turn:
        """Where the message of that number stands in the text of all."""
        asked, neighbour = self._asked(messages[:number], tools)
        through = text if number == len(messages) - 1 else self._text(messages[: number + 1], tools)
        if not text.startswith(asked) or not through.startswith(asked):
            raise Refused(_REWRITTEN.format(number + 1))
        start = len(asked)
        words = len(through) - _common_end(through[start:], neighbour[start:])
        mark = self._mark(through, start, words)
        end = self._end_of_sequence() if mark is None else self._id(mark.group())
        words = alone = words if mark is None else min(words, mark.start())
        if not text.startswith(through[:words]):  # as the last turn it is written differently
            words = self._end_of_words(messages, number, tools, text, start)
        if mark is not None and not text.startswith(through[alone : mark.end()], words):
            try:  # where another turn follows, the end may be another
                through = self._text(messages[: number + 1], tools, asks=True).removesuffix(self._header)
                mark = self._mark(through, start, alone)
            except DataError:  # a template that asks for no answer after an answer
                mark = None
        if mark is not None and text.startswith(through[alone : mark.end()], words):
            stop = self._after(mark.group(), text, words + mark.end() - alone)
            return _Turn(start, stop, self._id(mark.group()), added=False)
        return _Turn(start, words, end, added=True)

    def _end_of_words(
        self, messages: Sequence[Message], number: int, tools: Sequence[Any], text: str, start: int
    ) -> int:
        """Where a turn that others follow has its last word: what comes after is the same with other words."""
        others = [*messages[:number], Message("assistant", HOLE), *messages[number + 1 :]]
        neighbour = self._text(others, tools)
        if HOLE not in neighbour[start:]:
            raise Refused(_REWRITTEN.format(number + 1))
        return len(text) - _common_end(text[start:], neighbour[start:])

    def _asked(self, before: Sequence[Message], tools: Sequence[Any]) -> tuple[str, str]:
        """What precedes an answer to ``before``, and the same conversation with a hole for an answer.

        That is what the template writes when it asks for an answer; where it makes no difference then, or nothing
        stands before, all that it writes up to the answer, the header of the turn included.
        """
        neighbour = self._text([*before, Message("assistant", HOLE)], tools)
        header, hole, _ = neighbour.partition(HOLE)
        if not hole:
            raise Refused(_LEFT_OUT)
        asked = self._text(before, tools, asks=True) if before else None
        if asked is None or not header.startswith(asked):
            return header.removesuffix(self._between), neighbour
        between = header[len(asked) :]
        return (header if between.strip() and asked == self._text(before, tools) else asked), neighbour

    def _mark(self, through: str, start: int, words: int) -> re.Match[str] | None:
        """The token that ends the turn with which ``through`` ends: the first one behind the words.

        A special token is the template's, as no text has any, so one that only begins before ``words`` counts: the
        neighbour ends with another that looks alike. Where the two have no end in common, it is the last of all.
        """
        marks = list(self._added.finditer(through, start))
        for mark in marks:
            if mark.end() > words and (mark.start() >= words or self._special.fullmatch(mark.group())):
                return mark
        last = marks[-1] if marks else None
        closes = last is not None and self._special.fullmatch(last.group()) and not through[last.end() :].strip()
        return last if closes else None

    def _after(self, mark: str, text: str, stop: int) -> int:
        """Where the end of a turn is over: some tokens take the blanks that follow with them."""
        return len(text) - len(text[stop:].lstrip()) if mark in self._swallowing else stop

    def _end_by_template(self) -> set[str]:
        """The token with which the template ends a turn: texts cannot have it either, special or not."""
        try:
            asked, neighbour = self._asked([Message("user", "?")], ())
        except (Refused, DataError):
            return set()
        hole = neighbour.index(HOLE) + len(HOLE)
        self._between = neighbour[len(asked) : hole - len(HOLE)]
        self._header = asked.removeprefix(self._text([Message("user", "?")], ()))
        mark = self._mark(neighbour, hole, hole)
        return set() if mark is None else {mark.group()}

    def _marked_message(self, message: Message, spelled: list[str]) -> Message:
        content, extra = self._marked(message.content, spelled), self._marked(dict(message.extra), spelled)
        return replace(message, content=content, extra=extra)

    def _marked(self, value: Any, spelled: list[str]) -> Any:
        """The same with marks around all texts that spell a special token; these are entered in ``spelled``."""
        if isinstance(value, str):
            if any(mark in value for mark in (OPEN, CLOSE, HOLE)):
                raise DataError("A text holds one of U+FDD0, U+FDD1, U+FDD2, which are no characters. Take it out.")
            spelled += self._special.findall(value)
            return self._special.sub(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self._marked(inner, spelled) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(inner, spelled) for inner in value]
        return value

    def _id(self, token: str) -> int:
        found: int = self.tokenizer.convert_tokens_to_ids(token)
        return found

    def _end_of_sequence(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise Refused(
                "the chat template closes an assistant turn with no special token and the tokenizer has no "
                "end-of-sequence token, so the model could not learn to stop. Set tokenizer.eos_token."
            )
        token: int = self.tokenizer.eos_token_id
        return token


_REWRITTEN = (
    "the chat template writes the conversation up to message {} differently once later turns follow, so the "
    "assistant's tokens cannot be told apart. Split such conversations into rows that end with their only trained "
    "turn, give the others the weight 0, or set a plainer template (data.template, tokenizer.chat_template)."
)
_LEFT_OUT = (
    "the chat template leaves the assistant's text out. Use another template (data.template, tokenizer.chat_template)."
)


def _common_end(one: str, other: str) -> int:
    """Length of the longest text with which both end."""
    most = min(len(one), len(other))
    return next((n for n in range(most) if one[-1 - n] != other[-1 - n]), most)
