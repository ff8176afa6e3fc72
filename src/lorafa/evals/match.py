"""Exact match: the answer that is written is, word for word, that of the row. Text-to-text tasks are measured by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafa.data.records import Record
from lorafa.data.sources import records_to_measure
from lorafa.errors import ConfigError
from lorafa.evals.by_length import Progress
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import answer_length, check_prompts, generate_greedy
from lorafa.evals.shares import in_words, share
from lorafa.models.kinds.entry import TEXT
from lorafa.settings.checks import check_int

LEAST = 8
"""Tokens that every answer may have."""


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """How many answers are written, and how long."""

    size: int | None = None
    """Records asked, at most; null all of them."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; null is a quarter more than the longest of those asked, and at least 8, as far as the
    model's context goes."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("size", self.size, at_least=1)
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, at_least=1)


def _gold(record: Record) -> str:
    return record.messages[len(record.question)].content.strip()


def _asks(heldout: Sequence[Record], settings: MatchSettings) -> list[Record]:
    """The records with a question, up to ``size`` of them."""
    return [record for record in heldout if not record.plain and record.question][: settings.size]


def _length(subject: Subject, records: Sequence[Record], settings: MatchSettings, prompts: list[list[int]]) -> int:
    golds = [_gold(record) for record in records]
    ids = subject.tokenizer(text_target=golds).input_ids if golds else []
    return answer_length(subject.model, prompts, settings.max_new_tokens, map(len, ids), LEAST)


def _check(subject: Subject, records: Sequence[Record], settings: MatchSettings) -> None:
    if records:
        prompts = subject.prompts(records)
        check_prompts(subject.model, prompts, _length(subject, records, settings, prompts))


def _measure(
    subject: Subject, records: Sequence[Record], settings: MatchSettings, batch_size: int, progress: Progress
) -> Scores:
    prompts = subject.prompts(records)
    longest = _length(subject, records, settings, prompts)
    written = generate_greedy(
        subject.model,
        subject.tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=longest,
        ends=subject.ends,
        progress=progress,
    )
    outputs = [subject.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
    golds = [_gold(record) for record in records]
    right = [output == gold for output, gold in zip(outputs, golds, strict=True)]
    cut = sum(len(ids) >= longest for ids in written)
    numbers = {**share(right), "cut": cut, "max_new_tokens": longest}
    answers = [
        {"question": record.question[-1].content, "gold": gold, "output": output, "correct": correct}
        for record, gold, output, correct in zip(records, golds, outputs, right, strict=True)
    ]
    words = in_words(right, "answers word for word")
    if cut:
        words += f", {cut} cut at {longest} tokens"
    return Scores(words, numbers, answers, Measured("accuracy", [float(one) for one in right]))


def _read(source: Source, settings: MatchSettings) -> list[Record]:
    """The records of a file, all of them or the first ``size``."""
    if source.name is None:
        raise ConfigError("task=match has no rows of its own. Give data=<file>, with a prompt and an answer a row.")
    return _asks(records_to_measure(source.name, dict(source.columns)), settings)


MATCH = Evaluation(
    asks=_asks,
    check=_check,
    measure=_measure,
    read=_read,
    answer_length=_length,
    needs=frozenset({TEXT}),
    settings=MatchSettings,
)
