"""Texts with their answers, for models that read the one and write the other: encoders with a decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lorafa.data.cells import MEND
from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Tokenized, padded
from lorafa.data.encoding import Encoding
from lorafa.data.records import Record
from lorafa.data.rendering import render
from lorafa.data.unread import UNREAD, Unread
from lorafa.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def row_of(record: Record) -> str:
    """Which row it is: its place, or how it begins."""
    return record.place or repr(record.messages[0].content[:60])


def text_of(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a model reads of a record: the user's text as it stands, or the question as the tokenizer's chat template
    writes it, where it has one.

    Raises:
        DataError: there is nothing before the answer, or without a template more than one text of the user.
    """
    question = () if record.plain else record.question
    if not question:
        raise DataError(
            f"{row_of(record)}: the row has no question before its answer, and a model of this kind reads one text and "
            "answers it. Give rows with a prompt and an answer (data.prompt_column, data.completion_column)."
        )
    if tokenizer.chat_template:
        return render(question, tokenizer, add_generation_prompt=True, tools=record.tools)
    if [message.role for message in question] != ["user"] or record.tools:
        found = ", ".join(message.role for message in record.messages)
        tools = " and tools" if record.tools else ""
        raise DataError(
            f"{row_of(record)}: a model of this kind reads one text and answers it, found the turns {found}{tools}. "
            "Give rows of one prompt and one answer, or a template that writes them as one text: data.template=<name>."
        )
    return question[0].content


def answer_of(record: Record) -> str:
    """The last answer, which is the one that is trained.

    Raises:
        DataError: it carries more than a text, or is not to be trained, or something follows it.
    """
    answer = record.messages[len(record.question)]
    if not answer.trained or answer.extra or answer is not record.messages[-1]:
        raise DataError(
            f"{row_of(record)}: the row does not end with an answer in words that is trained, which is all that a "
            f"model of this kind learns. {MEND}"
        )
    return answer.content


class TextEncoder:
    """What the encoders of single texts share: how a text becomes ids, and what is said of all rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.ends: set[int] = set()
        self.rows = 0
        self._unread = Unread(tokenizer)
        self._said: dict[str, tuple[int, str]] = {}

    @property
    def templated(self) -> bool:
        """Whether a chat template writes what is read."""
        return bool(self.tokenizer.chat_template and self.rows)

    def read(self, record: Record) -> tuple[list[int], bool]:
        """The ids of what is read, with the tokenizer's own special tokens, and whether they were cut at
        ``max_length``."""
        text = text_of(record, self.tokenizer)
        ids, cut = prompt_ids(text, self.tokenizer, self.max_length)
        if not ids:
            raise _no_token(record, text)
        return ids, cut

    def note(self, record: Record, texts: Sequence[str], ids: Sequence[int]) -> None:
        """Count a row, and keep in mind what the tokenizer cannot read of it."""
        self.rows += 1
        for what in self._unread.remark(texts, ids):
            count, first = self._said.get(what, (0, row_of(record)))
            self._said[what] = (count + 1, first)

    def remarks(self) -> list[str]:
        """What is to be said of the records so far.

        Raises:
            DataError: there were none.
        """
        if not self.rows:
            raise DataError("There are no records to tokenize. Give some.")
        words = {UNREAD: f"{UNREAD} ({self._unread.characters()})"}
        return [
            f"{count:,} of {self.rows:,} rows {words.get(what, what)}. The first: {first}."
            for what, (count, first) in self._said.items()
        ]


def _no_token(record: Record, text: str) -> DataError:
    return DataError(f"{row_of(record)}: the tokenizer makes no token of the text {text[:40]!r}. Delete the row.")


class PairEncoder(TextEncoder):
    """From records to samples of an encoder with a decoder: the ids of the prompt, then those of the answer, which are
    trained and end with the end-of-sequence token. Each of the two is cut at ``max_length``.

    Raises:
        DataError: of :meth:`sample`, with the row: it is not one prompt with one answer, or the tokenizer makes no
            token of it.
    """

    def sample(self, record: Record) -> Sample:
        """The sample of a record."""
        tokenizer, end = self.tokenizer, self.tokenizer.eos_token_id
        if end is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so the model could not learn where an answer ends. Set "
                "tokenizer.eos_token."
            )
        answer, (prompt, cut) = answer_of(record), self.read(record)
        if not tokenizer(text_target=answer, add_special_tokens=False).input_ids:
            raise _no_token(record, answer)
        written: list[int] = list(tokenizer(text_target=answer).input_ids)
        written = written if written[-1:] == [end] else [*written, end]
        cut = cut or len(written) > self.max_length
        written = written[: self.max_length]
        self.ends.add(end)
        self.note(record, [message.content for message in record.messages], [*prompt, *written])
        return Sample([*prompt, *written], [IGNORE] * len(prompt) + written, truncated=cut, place=record.place)


PAIRS = Encoding("pairs", PairEncoder)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> tuple[list[int], bool]:
    """The ids of a text with the tokenizer's own special tokens, of at most so many, and whether any were cut away.

    What is cut is the end of the text; the special tokens stay.
    """
    ids: list[int] = list(tokenizer(text).input_ids)
    if max_length is None or len(ids) <= max_length:
        return ids, False
    return list(tokenizer(text, truncation=True, max_length=max_length).input_ids), True


def prompts_of(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What an encoder reads of each record, before its decoder writes the answer.

    Raises:
        DataError: as :func:`text_of`.
    """
    return [prompt_ids(text_of(record, tokenizer), tokenizer)[0] for record in records]




def divided(sample: Tokenized) -> tuple[list[int], list[int]]:
    """(what is read, what is written) of a sample: it is cut where its first trained token is."""
    first = next((at for at, label in enumerate(sample.labels) if label != IGNORE), len(sample.labels))
    return sample.input_ids[:first], sample.labels[first:]


@dataclass(frozen=True)
class PairCollator:
    """Right padding of both sides, each to the longest of the batch; masked by position, as in
    :class:`~lorafa.data.collate.Collator`."""

    pad_id: int

    def __call__(self, samples: Sequence[Tokenized]) -> dict[str, Tensor]:
        """int64 ``input_ids``, ``attention_mask`` (samples, longest prompt), ``labels`` (samples, longest answer)."""
        read, written = zip(*map(divided, samples), strict=True)
        return {
            "input_ids": padded(read, self.pad_id),
            "attention_mask": padded([[1] * len(ids) for ids in read], 0),
            "labels": padded(written, IGNORE),
        }

