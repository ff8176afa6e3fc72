"""Who answers: the base model and each adapter on it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafa.chat.options import Options
from lorafa.data.chat import encode_prompt
from lorafa.data.records import Message, Record
from lorafa.errors import ConfigError, DataError, did_you_mean
from lorafa.evals.generation import Sampling, context_of, room_after
from lorafa.models.kinds.found import kind_of


@dataclass(frozen=True, eq=False)
class Speaker:
    """The base model or one adapter, under the name that users give it."""

    name: str
    adapter: str
    """What the adapter is called on the model; ``"__base__"`` for the base."""
    tokenizer: Any
    """With the chat template this one was trained with."""
    ends: frozenset[int]
    """Tokens after which an answer is over."""
    vocabulary: int
    """Tokens below this number are its own. Tables that grew for the new tokens of one adapter have more rows, which
    mean nothing to the others."""


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a batch: a prompt, who answers it, and how."""

    speaker: Speaker
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Speakers:
    """A model with all its adapters, and who can answer by it, in the order in which they are shown."""

    model: Any
    by_name: Mapping[str, Speaker]
    base: str
    """The name of the one that is the base alone."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a tokenizer works: the fast ones cannot be used by two threads at once."""

    def find(self, name: str) -> Speaker:
        """The one of that name; raises ConfigError."""
        if name not in self.by_name:
            raise ConfigError(
                f"There is no {name!r} here.{did_you_mean(name, self.by_name)} There are: {', '.join(self.by_name)}."
            )
        return self.by_name[name]

    def row(self, speaker: Speaker, messages: Sequence[Message], options: Options, place: int = 0) -> Row:
        """The row that answers a conversation, through the chat template: as the speaker was trained to be asked.

        Args:
            messages: they end before an answer.
            place: number of the answer among those with one seed.

        Raises:
            DataError: the template refuses the conversation, or it leaves no room for an answer.
        """
        kind = kind_of(self.model)
        with self.lock:
            if kind.own_template:
                prompt = encode_prompt(messages, speaker.tokenizer)
            else:
                (prompt,) = kind.prompts([Record((*messages, Message("assistant", "?")))], speaker.tokenizer)
        return self._row(speaker, prompt, options, place)

    def row_of_text(self, speaker: Speaker, text: str, options: Options, place: int = 0) -> Row:
        """The row that continues a text, which no template writes; special tokens that it spells are these tokens.

        Raises:
            DataError: the text has no token, or leaves no room for an answer.
        """
        with self.lock:
            prompt = list(speaker.tokenizer(text).input_ids)
        closed = prompt[-1:] == [speaker.tokenizer.eos_token_id] and not text.endswith(speaker.tokenizer.eos_token)
        if closed and kind_of(self.model).own_template:  # the tokenizer closes every text, and this one goes on
            prompt.pop()
        return self._row(speaker, prompt, options, place)

    def decode(self, speaker: Speaker, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        with self.lock:
            text: str = speaker.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _row(self, speaker: Speaker, prompt: list[int], options: Options, place: int) -> Row:
        if not prompt:
            raise DataError("The prompt has no token, so nothing can follow it. Write something.")
        if max(prompt) >= speaker.vocabulary:
            raise DataError(
                f"The tokenizer of {speaker.name} writes token {max(prompt)}, and its model has {speaker.vocabulary} "
                "tokens. They do not belong together: put the model's own tokenizer beside it."
            )
        room = room_after(self.model, len(prompt))
        if room is not None and room < 1:
            raise DataError(
                f"The conversation has {len(prompt)} tokens for {speaker.name}, and the model's context of "
                f"{context_of(self.model)} leaves no room for an answer. Begin anew, or say less."
            )
        length = options.max_new_tokens if room is None else min(options.max_new_tokens, room)
        return Row(speaker, prompt, length, options.sampling(place), options.stops)
