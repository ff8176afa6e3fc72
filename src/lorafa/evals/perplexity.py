"""How well texts, or the answers of conversations, are predicted: nats a token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lorafa.data.chat import IGNORE, WHOLE, Sample, encoded
from lorafa.data.collate import Collate
from lorafa.data.records import Message, Record
from lorafa.data.sources import records_to_measure
from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.evals.by_length import Progress
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import context_of
from lorafa.evals.loss import row_losses
from lorafa.models.kinds.entry import LIKELIHOOD, NEXT_TOKEN
from lorafa.settings.checks import check_int
from lorafa.storage.paths import user_path

TEXT = ".txt"
"""The ending of a file that is one text."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokens write that are a part of a character."""
_LARGEST_LOSS = 700.0
"""exp of more is no float."""


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """How texts are cut to what the model reads at once."""

    size: int | None = None
    """Records measured, at most; null all of them."""
    window: int = 1024
    """Longest piece of a plain text, in tokens; conversations are cut there."""
    overlap: int | None = None
    """Tokens of the piece before that a piece begins with, read and not counted; null is half a window."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("size", self.size, at_least=1)
        check_int("window", self.window, at_least=2)
        if self.overlap is not None:
            check_int("overlap", self.overlap, at_least=0)
            if self.overlap >= self.window:
                raise ConfigError(
                    f"eval.overlap={self.overlap} leaves no token of a window of {self.window} to count. Make it "
                    "smaller."
                )

    def reading(self, model: Any) -> tuple[int, int]:
        """Window and overlap in tokens, as far as the model's context goes; half a window where nothing is said."""
        window = min(self.window, context_of(model) or self.window)
        return window, window // 2 if self.overlap is None else min(self.overlap, window - 1)


@dataclass(frozen=True)
class _Text:
    """What is counted of one record."""

    nats: float
    tokens: int
    bytes: int
    """UTF-8, of the counted tokens written out; tokens such as the one that ends a text have none."""


def pieces(sample: Sample, window: int, overlap: int) -> list[Sample]:
    """A sample in windows; each labelled token is counted in one of them, with ``overlap`` tokens before it at least,
    where there are as many."""
    ids, labels = sample.input_ids, sample.labels
    found, first = [], 0
    while True:
        begin = max(0, first - max(1, overlap))  # its first token is predicted from the one before
        end = min(len(ids), begin + window)
        counted = [IGNORE] * (first - begin) + labels[first:end]
        found.append(Sample(ids[begin:end], counted))
        if end == len(ids):
            return found
        first = end


def _measure(
    subject: Subject, records: Sequence[Record], settings: PerplexitySettings, batch_size: int, progress: Progress
) -> Scores:
    texts, cut = _texts(subject, records, settings, batch_size, progress)
    nats, tokens, size = (sum(getattr(text, name) for text in texts) for name in ("nats", "tokens", "bytes"))
    if not size:
        raise DataError("The counted tokens write no text at all, so there are no bits per byte. Check the records.")
    loss, bits = nats / tokens, nats / math.log(2) / size
    perplexity = math.exp(loss) if loss < _LARGEST_LOSS else math.inf
    values = [text.nats / math.log(2) / text.bytes if text.bytes else 0.0 for text in texts]
    measured = Measured("bits_per_byte", values, [float(text.bytes) for text in texts], higher_is_better=False)
    words = f"loss {loss:.4f} nats a token, perplexity {perplexity:.4g}, {bits:.4f} bits per byte"
    numbers = {
        "loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens, "texts": len(texts),
        "cut": cut,
    }  # fmt: skip
    if cut:
        words += f", {cut} conversations cut at {settings.reading(subject.model)[0]} tokens"
    return Scores(words, numbers, measured=measured)


def _texts(
    subject: Subject, records: Sequence[Record], settings: PerplexitySettings, batch_size: int, progress: Progress
) -> tuple[list[_Text], int]:
    """What is counted of each record, and how many conversations were cut at the window."""
    window, overlap = settings.reading(subject.model)
    kind = subject.kind
    goes_on = NEXT_TOKEN in kind.offers  # an answer goes on where its prompt ends; for others it is a text by itself
    cut = first_window if goes_on else _as_it_is
    longest = WHOLE if goes_on else window  # others cut prompt and answer, each by itself
    whole = encoded(records, kind.encoding(subject.model).make(subject.tokenizer, longest)).samples
    samples = [one if record.plain else cut(one, window) for record, one in zip(records, whole, strict=True)]
    parts = [
        (number, piece)
        for number, (record, sample) in enumerate(zip(records, samples, strict=True))
        for piece in (pieces(sample, window, overlap) if record.plain else [sample])
    ]
    if not any(_counted(piece) for _, piece in parts):
        raise DataError(
            f"None of the {len(records)} records has a token to count within eval.window={window}. Raise it."
        )
    nats, tokens = [0.0] * len(records), [0] * len(records)
    size = [_bytes(sample, subject.tokenizer, goes_on) for sample in samples]
    losses = row_losses(subject.model, [piece for _, piece in parts], _collator(subject), batch_size, progress)
    for (number, piece), loss in zip(parts, losses, strict=True):
        nats[number] += loss
        tokens[number] += len(_counted(piece))
    shortened = sum(
        one.truncated or (not record.plain and goes_on and len(one.input_ids) > window)
        for record, one in zip(records, whole, strict=True)
    )
    return [_Text(*each) for each in zip(nats, tokens, size, strict=True)], shortened


def _bytes(sample: Sample, tokenizer: Any, goes_on: bool) -> int:
    """Bytes of what the counted tokens write, in UTF-8; a character of several tokens is that of its last one.

    Tokens are written out behind those before them if the text ``goes_on`` there: alone they may be parts of
    characters, and the first of a text has no blank before it where others have one.
    """
    counted = [False, *(label != IGNORE for label in sample.labels[1:])]
    size, begin = 0, 0
    for here, run in groupby(counted):
        end = begin + len(list(run))
        if here:
            ids = sample.input_ids
            before = _written(tokenizer, ids[:begin]) if goes_on else ""
            text = _written(tokenizer, ids[:end] if goes_on else ids[begin:end])
            if not text.startswith(before):  # it ends in a part of a character, which is whole in the text
                before = before.rstrip(REPLACEMENT)
            size += len(text.removeprefix(before).encode())
        begin = end
    return size


def _written(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def first_window(sample: Sample, window: int) -> Sample:
    """A conversation as far as a window goes."""
    return Sample(sample.input_ids[:window], sample.labels[:window])


def _as_it_is(sample: Sample, window: int) -> Sample:
    return sample


def _counted(sample: Sample) -> list[int]:
    return [label for label in sample.labels[1:] if label != IGNORE]


def _collator(subject: Subject) -> Collate:
    return subject.kind.collator(subject.tokenizer.pad_token_id or 0)


def _asks(heldout: Sequence[Record], settings: PerplexitySettings) -> list[Record]:
    return list(heldout[: settings.size])


def _read(source: Source, settings: PerplexitySettings) -> list[Record]:
    if source.name is None:
        raise ConfigError(
            "task=perplexity has no text of its own. Give data=<file> (.txt, or rows with a column 'text')."
        )
    if source.name.endswith(TEXT):
        return [text_file(source.name)]
    return records_to_measure(source.name, dict(source.columns))[: settings.size]


def text_file(name: str) -> Record:
    """A file of plain text as one record.

    Raises:
        SourceError: it is not there, cannot be read, is not UTF-8, or is empty.
    """
    path = user_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is no text in UTF-8: {error.reason} at byte {error.start}. Convert it.") from error
    except OSError as error:
        raise SourceError(f"{name} cannot be read: {error.strerror or error}. Check the path.") from error
    if not text.strip():
        raise SourceError(f"{name} is empty. Give a text.")
    return Record((Message("assistant", text),), plain=True, place=name)


PERPLEXITY = Evaluation(
    asks=_asks,
    check=lambda *_: None,
    measure=_measure,
    read=_read,
    needs=frozenset({LIKELIHOOD}),
    settings=PerplexitySettings,
)
"""How well texts, or the answers of conversations, are predicted: nats a token, perplexity, bits per byte."""
