"""Conversations to token ids and labels: what the model reads, and which of it the model is trained to write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from rich.text import Text

from lorafa.data import TEMPLATES
from lorafa.data.apart import Tokens
from lorafa.data.cuts import Stretch, Writer
from lorafa.data.records import Message, Record
from lorafa.data.rendering import render, special_tokens, start_token
from lorafa.data.unread import UNREAD, Unread
from lorafa.errors import DataError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE",
    "WHOLE",
    "Encoded",
    "Encoder",
    "Sample",
    "SampleEncoder",
    "encode_all",
    "encode_prompt",
    "encode_prompts",
    "encoded",
    "render",
    "render_sample",
]

IGNORE = -100
"""The label of a token that is read but not trained, as in ``torch.nn.functional.cross_entropy``."""
WHOLE = 2**31
"""A length in tokens that cuts nothing: no text is as long."""


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation: ``labels`` are ``input_ids`` where trained, ``IGNORE`` elsewhere; equal lengths."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    place: str = field(default="", compare=False)
    """Where the row stands that it was made of, for messages."""

    @property
    def trained(self) -> int:
        """Number of tokens that carry a label."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Encoded:
    """The usable samples; ``dropped`` had no trained token within the length limit, ``truncated`` lost their tail."""

    samples: Sequence[Sample]
    dropped: int
    truncated: int
    ends: frozenset[int] = frozenset()
    """The ids with which trained turns end."""


class SampleEncoder(Protocol):
    """From records to samples, one after another, and at the end what is to be said of them."""

    ends: set[int]
    """The ids with which trained turns end."""

    @property
    def templated(self) -> bool:
        """Whether a chat template has written any of them."""

    def sample(self, record: Record) -> Sample:
        """The sample of a record; raises DataError, with the row, for one that cannot be trained on."""

    def remarks(self) -> list[str]:
        """What is to be said of the records so far; raises DataError where no sample is left."""


class Encoder:
    """From records to samples, one after another: what :func:`encode_all` does, and what it would say at the end.

    Raises:
        DataError: of :meth:`sample`, with the row: a conversation has no assistant turn that is trained; the template
            refuses a conversation, leaves a part of what is trained out, or writes a turn differently once others
            follow; the tokenizer cannot tokenize a conversation in parts, or has no token to end a text with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.ends: set[int] = set()
        """The ids with which trained turns end."""
        self.rows = 0
        self.usable = 0
        """Samples that have a trained token."""
        self._earliest: int | None = None
        self._said: dict[str, tuple[int, str]] = {}
        self._writing: tuple[Writer, Tokens] | None = None
        self._unread = Unread(tokenizer)

    @property
    def templated(self) -> bool:
        """Whether a chat template has written any of them."""
        return self._writing is not None

    def sample(self, record: Record) -> Sample:
        """The sample of a record, cut at ``max_length``."""
        ids, labels, end, said = self._text(record) if record.plain else self._conversation(record)
        for what in (*said, *self._unread.remark([message.content for message in record.messages], ids)):
            count, first = self._said.get(what, (0, _row(record)))
            self._said[what] = (count + 1, first)
        start = next(i for i, label in enumerate(labels) if label != IGNORE)
        self._earliest = start if self._earliest is None else min(start, self._earliest)
        self.ends |= end
        self.rows += 1
        self.usable += start < self.max_length
        cut = len(ids) > self.max_length
        return Sample(ids[: self.max_length], labels[: self.max_length], truncated=cut, place=record.place)

    def remarks(self) -> list[str]:
        """What is to be said of the records so far.

        Raises:
            DataError: there were none, or none has a trained token within ``max_length``.
        """
        if not self.rows:
            raise DataError("There are no records to tokenize. Give some.")
        if not self.usable:
            raise DataError(
                f"None of the {self.rows} samples has a trained token within max_length={self.max_length}: the first "
                f"answer to start does so at token {(self._earliest or 0) + 1}. Raise data.max_length, or shorten the "
                "prompts."
            )
        without = [_no_template()] if self.templated and not self.tokenizer.chat_template else []
        rows = f"{self.rows:,} rows"
        words = {UNREAD: f"{UNREAD} ({self._unread.characters()})"}
        return without + [
            f"{count:,} of {rows} {words.get(what, what)}. The first: {one}."
            for what, (count, one) in self._said.items()
        ]

    def _conversation(self, record: Record) -> tuple[list[int], list[int], set[int], list[str]]:
        if self._writing is None:
            self._writing = Writer(self.tokenizer), Tokens(self.tokenizer)
        return _tokenize(record, *self._writing)

    def _text(self, record: Record) -> tuple[list[int], list[int], set[int], list[str]]:
        """A text as the model reads it: the token that begins a sequence, where this tokenizer writes one, and the one
        that ends it; neither twice."""
        tokenizer, text = self.tokenizer, record.messages[0].content
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so the model could not learn where a text ends. Set "
                "tokenizer.eos_token."
            )
        ids: list[int] = list(tokenizer(text, add_special_tokens=False).input_ids)
        if not ids:
            raise DataError(f"{_row(record)}: the tokenizer makes no token of the text {text[:40]!r}. Delete the row.")
        spelled = any(token in text for token in self._special)
        if self._start and ids[:1] != self._start:
            ids = [*self._start, *ids]
        ids = ids if ids[-1:] == [end] else [*ids, end]
        return ids, list(ids), {end}, [_SPELLED] if spelled else []

    @cached_property
    def _special(self) -> set[str]:
        return special_tokens(self.tokenizer)

    @cached_property
    def _start(self) -> list[int]:
        token = start_token(self.tokenizer)
        return [self.tokenizer.convert_tokens_to_ids(token)] if token else []


_SPELLED = "spell a special token in a column 'text', where it is that token"


def encode_all(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenize conversations and label their assistant turns, each through the token that ends it.

    The chat template writes the conversation; what the assistant says in it is trained, from what the model is asked
    with up to the end of the turn. The token after the end (ChatML writes a newline), role headers and system prompts
    are not. A turn that the template ends with no token gets the end-of-sequence token, or the one it writes in the
    last turn. Text that spells a special token stays text. Without a chat template the one called ``plain`` is used,
    with a warning. What the template leaves out of what is read, or changes in blanks, is a warning with the number of
    rows. Longer conversations lose their tail; those whose answer lies beyond ``max_length`` are dropped and counted.

    A record that is ``plain`` is trained whole, with an end-of-sequence token at its end; no template writes it, and
    the special tokens that it spells are these tokens, with a warning.

    Raises:
        DataError: no sample is left; as :class:`Encoder`.
    """
    return encoded(records, Encoder(tokenizer, max_length))


def encoded(records: Iterable[Record], encoder: SampleEncoder) -> Encoded:
    """The samples of records, with a warning for what is to be said of them.

    Raises:
        DataError: no sample is left; what the encoder raises.
    """
    samples = [encoder.sample(record) for record in records]
    for text in encoder.remarks():
        warn(text)
    usable = [sample for sample in samples if sample.trained]
    truncated = sum(sample.truncated for sample in usable)
    return Encoded(usable, len(samples) - len(usable), truncated, frozenset(encoder.ends))


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


def _no_template() -> str:
    return (
        "The tokenizer has no chat template. Conversations are written with the one called plain: each text on a "
        "line, without the names of who speaks, and an end-of-sequence token after each answer. data.template= "
        f"takes {', '.join(TEMPLATES.names())} or a file."
    )


def _tokenize(record: Record, writer: Writer, tokens: Tokens) -> tuple[list[int], list[int], set[int], list[str]]:
    """Ids and labels of the whole conversation, the tokens with which its trained turns end, and what is to be said."""
    if not any(message.role == "assistant" for message in record.messages):
        raise DataError(
            f"The conversation has no assistant turn: {_row(record)}. There is nothing to train on: delete it."
        )
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
    ids: list[int] = []
    labels: list[int] = []
    for stretch, part in zip(written.stretches, _ended(written.stretches, parts), strict=True):
        if stretch.turn in trained and record.messages[stretch.turn].content.strip() and set(part) <= {stretch.end}:
            text = record.messages[stretch.turn].content
            raise DataError(f"{_row(record)}: the tokenizer makes no token of the text {text[:40]!r}. Delete the row.")
        ids += part
        labels += part if stretch.turn in trained else [IGNORE] * len(part)
    ends = {stretch.end for stretch in written.stretches if stretch.turn in trained and stretch.end is not None}
    return ids, labels, ends, list(dict.fromkeys(written.said))


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
