"""Conversations to token ids and labels: what the model reads, and which of it the model is trained to write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from lorafa.data.records import Message, Record
from lorafa.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that is read but not trained, as in ``torch.nn.functional.cross_entropy``."""

PLAIN_TEMPLATE = (
    "{{ start }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""For tokenizers without a chat template: prompt, newline, completion, end-of-sequence token."""


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


def encode_all(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenize conversations and label their assistant turns, each through its end-of-turn token.

    The chat template renders the conversation up to each assistant turn and through it; what the turn adds is trained.
    The token after the turn's end mark (ChatML writes a newline) is not. A template that closes a turn with no special
    token gets the end-of-sequence token there, so that the model learns to stop. Without a chat template
    ``PLAIN_TEMPLATE`` is used. Longer conversations lose their tail; those whose answer lies beyond ``max_length`` are
    dropped and counted.

    Raises:
        DataError: no sample is left; a conversation has no assistant turn; the template refuses a conversation, leaves
            the assistant's text out, or renders a prefix of it differently from the whole; the tokenizer cannot say
            where its tokens stand.
    """
    if not records:
        raise DataError("There are no records to tokenize. Give some.")
    samples, starts = [], []
    for record in records:
        ids, labels = _tokenize(record, tokenizer)
        start = next((i for i, label in enumerate(labels) if label != IGNORE), None)
        if start is None:
            raise DataError(
                "All labels of a sample are masked: the chat template leaves the assistant's text out. Use another "
                f"template or tokenizer. The sample: {_start(record)}."
            )
        starts.append(start)
        samples.append(Sample(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length))
    usable = [sample for sample in samples if sample.trained]
    if not usable:
        raise DataError(
            f"None of the {len(samples)} samples has a trained token within max_length={max_length}: the first answer "
            f"to start does so at token {min(starts) + 1}. Raise data.max_length, or shorten the prompts."
        )
    return Encoded(usable, len(samples) - len(usable), sum(sample.truncated for sample in usable))


def encode_prompt(messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids after which the model is to write an assistant turn: what precedes the labels of :func:`encode_all`."""
    text = render(messages, tokenizer, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def render(messages: Iterable[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    """The conversation as the text the model reads, special tokens written out.

    Raises:
        DataError: the template refuses the conversation, or there is neither a template nor an end-of-sequence token.
    """
    from jinja2.exceptions import TemplateError  # the command line knows this module before a command runs

    turns = [{"role": message.role, "content": message.content} for message in messages]
    plain = {} if tokenizer.chat_template else {"chat_template": PLAIN_TEMPLATE, "start": _start_token(tokenizer)}
    if plain and tokenizer.eos_token is None:
        raise DataError(
            "The tokenizer has neither a chat template nor an end-of-sequence token, so the model could not learn to "
            "stop. Set tokenizer.eos_token or tokenizer.chat_template."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **plain
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"The tokenizer's chat template refuses a conversation with the roles {roles}: {error}. "
            "Change the rows, or set tokenizer.chat_template."
        ) from error
    return text


def render_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The sample as the model reads it, for the terminal: trained tokens green, the others dim."""
    text = Text()
    for trained, run in groupby(zip(sample.input_ids, sample.labels, strict=True), lambda pair: pair[1] != IGNORE):
        piece = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        text.append(piece, style="green" if trained else "dim")
    return text


def _tokenize(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of the whole conversation."""
    if not any(message.role == "assistant" for message in record.messages):
        raise DataError(f"The conversation has no assistant turn: {_start(record)}. There is nothing to train on.")
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot say where in the text its tokens stand. "
            "Use a tokenizer with a tokenizer.json (a 'fast' one)."
        )
    text = render(record.messages, tokenizer, add_generation_prompt=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoding.input_ids)
    offsets: list[tuple[int, int]] = encoding.offset_mapping
    labels = [IGNORE] * len(ids)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    # From the last turn to the first: an inserted token then moves no position that is still needed.
    for start, end in reversed(_assistant_spans(record.messages, text, tokenizer)):
        turn = [i for i, (at, _) in enumerate(offsets) if start <= at < end]
        closing = [i for i in turn if ids[i] in special and not text[offsets[i][1] : end].strip()]
        if turn and not closing:
            closing = [turn[-1] + 1]
            ids.insert(closing[0], _end_of_sequence(tokenizer))
            labels.insert(closing[0], IGNORE)
        if turn:
            labels[turn[0] : closing[0] + 1] = ids[turn[0] : closing[0] + 1]
    return ids, labels


def _assistant_spans(
    messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Where each assistant turn stands in ``text``, as (start, end) in characters."""
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(messages[:i], tokenizer, add_generation_prompt=True) if i else ""
        through = render(messages[: i + 1], tokenizer, add_generation_prompt=False)
        if not text.startswith(before) or not text.startswith(through):
            raise DataError(
                f"The chat template renders the conversation up to message {i + 1} differently once later turns "
                "follow, so the assistant's tokens cannot be told apart. Split such conversations into rows that end "
                "with their only assistant turn, or set a plainer tokenizer.chat_template."
            )
        spans.append((len(before), len(through)))
    return spans


def _start_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token, if this tokenizer puts one before plain text."""
    bos: str | None = tokenizer.bos_token
    return bos if bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The chat template closes an assistant turn with no special token and the tokenizer has no end-of-sequence "
            "token, so the model could not learn to stop. Set tokenizer.eos_token."
        )
    token: int = tokenizer.eos_token_id
    return token


def _start(record: Record) -> str:
    return repr(record.messages[0].content[:60]) if record.messages else "(no messages)"
