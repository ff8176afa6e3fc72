"""Conversations to token ids and labels: what the model reads, and which of it the model is trained to write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lorafa.data import TEMPLATES
from lorafa.data.apart import Tokens
from lorafa.data.cuts import Stretch, Writer
from lorafa.data.records import Message, Record
from lorafa.data.rendering import render
from lorafa.errors import DataError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE", "Encoded", "Sample", "encode_all", "encode_prompt", "encode_prompts", "render", "render_sample"]

IGNORE = -100
"""The label of a token that is read but not trained, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation: ``labels`` are ``input_ids`` where trained, ``IGNORE`` elsewhere; equal lengths."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def trained(self) -> int:
        """Number of tokens that carry a label."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Encoded:
    """The usable samples; ``dropped`` had no trained token within the length limit, ``truncated`` lost their tail."""

    samples: list[Sample]
    dropped: int
    truncated: int
    ends: frozenset[int] = frozenset()
    """The ids with which trained turns end."""


def encode_all(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenize conversations and label their assistant turns, each through the token that ends it.

    The chat template writes the conversation; what the assistant says in it is trained, from what the model is asked
    with up to the end of the turn. The token after the end (ChatML writes a newline), role headers and system prompts
    are not. A turn that the template ends with no token gets the end-of-sequence token, or the one it writes in the
    last turn. Text that spells a special token stays text. Without a chat template the one called ``plain`` is used,
    with a warning. What the template leaves out of what is read, or changes in blanks, is a warning with the number of
    rows. Longer conversations lose their tail; those whose answer lies beyond ``max_length`` are dropped and counted.

    Raises:
        DataError: no sample is left; a conversation has no assistant turn that is trained; the template refuses a
            conversation, leaves a part of what is trained out, or writes a turn differently once others follow; the
            tokenizer cannot tokenize a conversation in parts. The row is named.
    """
    if not records:
        raise DataError("There are no records to tokenize. Give some.")
    _say_template(tokenizer)
    writer, tokens, said = Writer(tokenizer), Tokens(tokenizer), dict[str, list[str]]()
    samples, starts, ends = [], [], set[int]()
    for record in records:
        ids, labels, end = _tokenize(record, writer, tokens, said)
        starts.append(next(i for i, label in enumerate(labels) if label != IGNORE))
        ends |= end
        samples.append(Sample(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length))
    for what, rows in said.items():
        warn(f"{len(rows):,} of {len(records):,} rows {what}. The first: {rows[0]}.")
    usable = [sample for sample in samples if sample.trained]
    if not usable:
        raise DataError(
            f"None of the {len(samples)} samples has a trained token within max_length={max_length}: the first answer "
            f"to start does so at token {min(starts) + 1}. Raise data.max_length, or shorten the prompts."
        )
    truncated = sum(sample.truncated for sample in usable)
    return Encoded(usable, len(samples) - len(usable), truncated, frozenset(ends))


def encode_prompt(
    messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()
) -> list[int]:
    """The ids after which the model is to write an assistant turn: what precedes the labels of :func:`encode_all`.

    Raises:
        DataError: the template refuses the conversation, or leaves the assistant's text out.
    """
    return _prompt(messages, tools, Writer(tokenizer), Tokens(tokenizer))


def encode_prompts(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids after which the model is to write the last assistant turn of each record.

    Raises:
        DataError: as :func:`encode_prompt`; the row is named.
    """
    writer, tokens, prompts = Writer(tokenizer), Tokens(tokenizer), []
    for record in records:
        try:
            prompts.append(_prompt(record.question, record.tools, writer, tokens))
        except DataError as error:
            raise DataError(f"{_row(record)}: {error}") from error
    return prompts


def render_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The sample as the model reads it, for the terminal: trained tokens green, the others dim."""
    text = Text()
    for trained, run in groupby(zip(sample.input_ids, sample.labels, strict=True), lambda pair: pair[1] != IGNORE):
        piece = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        text.append(piece, style="green" if trained else "dim")
    return text


def _prompt(messages: Iterable[Message], tools: Sequence[Any], writer: Writer, tokens: Tokens) -> list[int]:
    before = writer.ask(list(messages), tools)
    return [token for part in _ended(before, tokens.ids(before)) for token in part]


def _say_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        warn(
            "The tokenizer has no chat template. Conversations are written with the one called plain: each text on a "
            "line, without the names of who speaks, and an end-of-sequence token after each answer. data.template= "
            f"takes {', '.join(TEMPLATES.names())} or a file."
        )


def _tokenize(
    record: Record, writer: Writer, tokens: Tokens, said: dict[str, list[str]]
) -> tuple[list[int], list[int], set[int]]:
    """Ids and labels of the whole conversation, and the tokens with which its trained turns end."""
    if not any(message.role == "assistant" for message in record.messages):
        raise DataError(f"The conversation has no assistant turn: {_row(record)}. There is nothing to train on.")
    trained = {i for i, message in enumerate(record.messages) if message.role == "assistant" and message.trained}
    if not trained:
        raise DataError(f"No assistant turn is to be trained, all have the weight 0: {_row(record)}. Leave it out.")
    try:
        written = writer.write(record.messages, record.tools)
        if gone := sorted(trained & written.refused.keys()):
            raise DataError(written.refused[gone[0]])
        parts = tokens.ids(written.stretches)
        if not tokens.keeps(written.stretches, [token for part in parts for token in part]):
            raise DataError("the tokenizer reads the conversation differently in parts. Use another one.")
    except DataError as error:
        raise DataError(f"{_row(record)}: {error}") from error
    for what in dict.fromkeys(written.said):
        said.setdefault(what, []).append(_row(record))
    ids: list[int] = []
    labels: list[int] = []
    for stretch, part in zip(written.stretches, _ended(written.stretches, parts), strict=True):
        ids += part
        labels += part if stretch.turn in trained else [IGNORE] * len(part)
    ends = {stretch.end for stretch in written.stretches if stretch.turn in trained and stretch.end is not None}
    return ids, labels, ends


def _ended(stretches: Sequence[Stretch], parts: Sequence[list[int]]) -> list[list[int]]:
    """The ids of each stretch with the end of its turn, where the template does not write it."""
    return [
        [*part, stretch.end] if stretch.added and stretch.end is not None else part
        for stretch, part in zip(stretches, parts, strict=True)
    ]


def _row(record: Record) -> str:
    """Which row it is: its place, or how it begins."""
    if record.place:
        return record.place
    return repr(record.messages[0].content[:60]) if record.messages else "(no messages)"
