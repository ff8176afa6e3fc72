"""Answers to prompts in the order in which they stand, as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lorafa.data.chat import WHOLE, Encoder, encode_prompt
from lorafa.data.records import Message, Record
from lorafa.data.unanswered import Unanswered
from lorafa.errors import DataError
from lorafa.evals.by_length import Progress
from lorafa.evals.generation import Sampling, context_of, generate_ids, room_for, seed_at
from lorafa.models.kinds.found import kind_of
from lorafa.processes import world_size

BATCHES = 4
"""Batches of each process that are answered before they are handed on: prompts of like length share one."""


@dataclass(frozen=True)
class Answering:
    """How prompts are answered."""

    max_new_tokens: int
    batch_size: int
    sampling: Sampling | None = None
    """None: the likeliest token each time."""

    @property
    def window(self) -> int:
        """How many prompts are answered before they are handed on."""
        return self.batch_size * BATCHES * world_size()


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str
    cut: bool
    """Whether it was still going on when its length was reached."""


def encoded(model: Any, tokenizer: Any, prompts: Sequence[Unanswered], max_new_tokens: int) -> list[list[int]]:
    """The prompts in tokens, through the chat template.

    Raises:
        DataError: the template refuses one, or one leaves no room for an answer; it is named.
    """
    found, kind = [], kind_of(model)
    for prompt in prompts:
        try:
            if kind.own_template:
                ids = encode_prompt(prompt.messages, tokenizer, prompt.tools)
            else:  # as this kind is trained
                (ids,) = kind.prompts([_answered(prompt)], tokenizer)
        except DataError as error:
            raise DataError(f"{prompt.place}: {error}") from error
        if not room_for(model, ids, max_new_tokens):
            raise DataError(
                f"{prompt.place}: the prompt has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} that "
                f"exceeds the model's context of {context_of(model)}. Ask for shorter answers, or leave it out."
            )
        found.append(ids)
    return found


def ends_of(tokenizer: Any, prompt: Unanswered) -> frozenset[int]:
    """The ids with which the chat template ends an answer."""
    encoder = Encoder(tokenizer, WHOLE)
    encoder.sample(_answered(prompt))
    return frozenset(encoder.ends)


def _answered(prompt: Unanswered) -> Record:
    """The prompt as a record, with something for an answer."""
    return Record((*prompt.messages, Message("assistant", "?")), tools=prompt.tools, place=prompt.place)


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Unanswered],
    how: Answering,
    first: int = 0,
    progress: Progress | None = None,
) -> Iterator[list[Answer]]:
    """The answers from prompt number ``first`` on, some at a time. Several processes share them out, and all get all.

    What is drawn for a prompt depends on the seed, its number and how many are answered together, not on ``first``, as
    long as that is a multiple of ``how.window``.

    Raises:
        DataError: as :func:`encoded`, before anything is answered.
    """
    ids = encoded(model, tokenizer, prompts, how.max_new_tokens)
    ends = ends_of(tokenizer, prompts[0]) if kind_of(model).own_template else frozenset()
    for begin in range(first, len(ids), how.window):
        some = ids[begin : begin + how.window]
        shown = None if progress is None else partial(_shifted, progress, begin, len(ids))
        drawn = how.sampling and replace(how.sampling, seed=seed_at(how.sampling.seed, begin))
        written = generate_ids(
            model,
            tokenizer,
            some,
            batch_size=how.batch_size,
            max_new_tokens=how.max_new_tokens,
            ends=ends,
            sampling=drawn,
            progress=shown,
        )
        yield [
            Answer(tokenizer.decode(one, skip_special_tokens=True), len(one) >= how.max_new_tokens) for one in written
        ]


def _shifted(progress: Progress, first: int, total: int, done: int, _: int) -> None:
    progress(first + done, total)
