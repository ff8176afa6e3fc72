"""Exact-match accuracy on problems whose answer is a number (GSM8K and its like)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from lorafa.data.numbers import last_number, only_number
from lorafa.data.records import Message, Record, final_answer
from lorafa.data.rows import converter
from lorafa.data.sets.prompts import asked, question_of
from lorafa.data.sources import records_to_measure
from lorafa.data.templates import find_template
from lorafa.errors import ConfigError, DataError, did_you_mean, shorten, warn
from lorafa.evals.benchmark import Official
from lorafa.evals.by_length import Progress
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import Sampling, answer_length, check_prompts, generate_ids
from lorafa.evals.sample_answers import sample_answers, with_question
from lorafa.evals.shares import in_words, share
from lorafa.models.kinds.entry import TEXT
from lorafa.models.kinds.found import kind_of
from lorafa.settings.checks import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalSample:
    """One question with what the model wrote; ``predicted`` is None when no answer could be read from it."""

    question: str
    gold: str
    output: str
    predicted: Fraction | None
    correct: bool
    cut: bool = False
    """Whether the answer was still going on when its length was reached."""


@dataclass(frozen=True)
class EvalResult:
    """``accuracy`` = correct / total, in [0, 1]; ``interval`` is its 95 % Wilson interval; ``unparsed`` counts outputs
    without a readable answer (they count as wrong), ``cut`` those that were still going on at ``max_new_tokens``.
    ``samples`` are in the order of the records."""

    accuracy: float
    correct: int
    total: int
    interval: tuple[float, float]
    unparsed: int
    cut: int
    max_new_tokens: int
    samples: list[EvalSample]


def extract_answer(text: str) -> Fraction | None:
    """The number an answer ends in: the last one on the line after the last ``####`` or "The answer is" that something
    follows, as `lorafa.data.numbers` reads it. None when there is no such mark or no number after it.
    """
    line = final_answer(text)
    return None if line is None else last_number(line)


def extract_upstream(text: str) -> Fraction:
    r"""The rule of the LoRA-GA and LoRA-One scripts, to compare with their numbers: the first ``####\s*(\d+)``, else 0.

    It reads "1,234" as 1, and negative or missing answers as 0 (so 0 = 0 counts as correct).
    """
    match = re.search(r"####\s*(\d+)", text)
    return Fraction(match[1]) if match else Fraction(0)


LEAST = 128
"""Tokens that every answer may have."""
EXTRACTORS = {"number": extract_answer, "upstream": extract_upstream}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    extract: str = "number",
    ends: Iterable[int] = (),
    progress: Progress | None = None,
    sampling: Sampling | None = None,
) -> EvalResult:
    """Ask every record's question, answer greedily or by ``sampling``, and compare the final numbers.

    ``extract`` names one of ``EXTRACTORS``; it is applied to the gold answer as well. ``ends`` are those that were
    trained, where an answer is over besides at the end tokens of tokenizer and model. The model (plain, or with
    adapters) and the tokenizer are left as they were.

    Raises:
        ConfigError: unknown ``extract``.
        DataError: no records; a record has no question or no numeric gold answer; a prompt does not fit the model.
    """
    if extract not in EXTRACTORS:
        raise ConfigError(
            f"Unknown answer rule {extract!r}.{did_you_mean(extract, EXTRACTORS)} Known: {', '.join(EXTRACTORS)}."
        )
    if not records:
        raise DataError("No records to evaluate on. Raise data.eval_size.")
    golds = [record.answer or "" for record in records]
    for record, gold in zip(records, golds, strict=True):
        if only_number(gold) is None:
            raise DataError(
                f"A record has not one number as its gold answer (found {record.answer!r}), so accuracy cannot be "
                f"measured: {record.messages[0].content[:60]!r}. Its last turn must end in '#### N'; without, measure "
                "the answer loss only."
            )
        if not record.question:
            raise DataError(
                f"A record asks nothing before its answer {gold!r}, so there is nothing to generate from. Leave it out."
            )
    prompts = kind_of(model).prompts(records, tokenizer)
    written = generate_ids(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ends=ends,
        progress=progress,
        sampling=sampling,
    )
    read = EXTRACTORS[extract]
    samples = []
    for record, gold, ids in zip(records, golds, written, strict=True):
        output = tokenizer.decode(ids, skip_special_tokens=True)
        predicted = read(output)
        question = record.question[-1].content
        right = predicted == read(f"#### {gold}")
        samples.append(EvalSample(question, gold, output, predicted, right, cut=len(ids) >= max_new_tokens))
    unparsed = sum(extract_answer(sample.output) is None for sample in samples)
    return EvalResult(
        **share([sample.correct for sample in samples]),
        unparsed=unparsed,
        cut=sum(sample.cut for sample in samples),
        max_new_tokens=max_new_tokens,
        samples=samples,
    )


@dataclass(frozen=True, kw_only=True)
class Gsm8kSettings:
    """How questions are asked and answers read."""

    size: int | None = 64
    """Held-out records answered by generation, at most: null all of them, 0 none. The answer loss is taken over all.
    Where none has an answer that can be graded, a few are answered for the report."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; null is a quarter more than the longest worked answer of those asked, and at least
    128, as far as the model's context goes."""
    extract: Literal["number", "upstream"] = "number"
    """How the final number is read: number, or upstream as the LoRA-GA scripts do, to compare with their accuracy."""
    published: bool = False
    """Ask as those scripts do, the last question alone: "Q: ...", a new line, "A: ", as bare text whatever the chat
    template is."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("size", self.size, at_least=0)
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, at_least=1)


def _length(subject: Subject, records: Sequence[Record], settings: Gsm8kSettings, prompts: list[list[int]]) -> int:
    worked = [record.messages[len(record.question)].content for record in records]
    ids = subject.tokenizer(worked, add_special_tokens=False)["input_ids"] if worked else []
    return answer_length(subject.model, prompts, settings.max_new_tokens, map(len, ids), LEAST)


def _asks(heldout: Sequence[Record], settings: Gsm8kSettings) -> list[Record]:
    """The records with a gold answer, up to ``size`` of them; where there are none at all, a few to look at."""
    graded = [record for record in heldout if record.answer is not None]
    if graded and (unread := [record for record in heldout if record.answer is None and _ends_in_figures(record)]):
        places = [record.place for record in unread if record.place]
        warn(
            f"{len(unread)} of {len(heldout)} records end in figures that are not one number, so they are not asked"
            f"{': ' + shorten(places) if places else ''}."
        )
    chosen = (graded or with_question(heldout))[: settings.size]
    return list(map(as_published, chosen)) if graded and settings.published else chosen


def _ends_in_figures(record: Record) -> bool:
    last = [message.content for message in record.messages if message.role == "assistant"][-1]
    return any(map(str.isdigit, final_answer(last) or ""))


def _as_asked(subject: Subject, records: Sequence[Record], settings: Gsm8kSettings) -> Subject:
    """The subject with the way in which it is asked: published prompts are bare text."""
    if not settings.published or not _graded(records):
        return subject
    tokenizer = copy.copy(subject.tokenizer)  # the caller's keeps its own template
    tokenizer.chat_template = find_template(BARE)
    return replace(subject, tokenizer=tokenizer)


def _check(subject: Subject, records: Sequence[Record], settings: Gsm8kSettings) -> None:
    subject = _as_asked(subject, records, settings)
    prompts = subject.prompts(records)
    if _graded(records):
        check_prompts(subject.model, prompts, _length(subject, records, settings, prompts))


def _graded(records: Sequence[Record]) -> bool:
    return any(record.answer is not None for record in records)


def _measure(
    subject: Subject, records: Sequence[Record], settings: Gsm8kSettings, batch_size: int, progress: Progress
) -> Scores:
    subject = _as_asked(subject, records, settings)
    longest = _length(subject, records, settings, subject.prompts(records))
    if not _graded(records):
        answers = sample_answers(subject, records, longest, batch_size, progress)
        return Scores(f"{len(answers)} answers to look at", {}, answers)
    found = evaluate(
        subject.model,
        subject.tokenizer,
        records,
        batch_size=batch_size,
        max_new_tokens=longest,
        extract=settings.extract,
        ends=subject.ends,
        progress=progress,
    )
    answers = [
        {"question": one.question, "gold": one.gold, "output": one.output, "correct": one.correct}
        for one in found.samples
    ]
    numbers = {name: value for name, value in asdict(found).items() if name != "samples"}
    measured = Measured("accuracy", [float(one.correct) for one in found.samples])
    words = in_words([one.correct for one in found.samples])
    if found.cut:
        words += f", {found.cut} answers cut at {longest} tokens"
    if settings.published:
        words += ", asked in bare text as published"
    return Scores(words, numbers, answers, measured)


BARE = "spaced"
"""The template of published prompts: a text stands alone, its answer behind a blank."""
OFFICIAL = Official("the test problems", "openai/gsm8k", "main", "test", "a copy of the official file")
"""Where the problems are."""


def official_problems(file: str | None, option: str = "data=test.jsonl") -> list[Record]:
    """The test problems of GSM8K, of a copy of the official file or of the Hub.

    Args:
        option: how a copy is given, for the error.

    Raises:
        SourceError: they cannot be read or fetched.
        DataError: there are none, or a row has no question, or no number as its answer.
    """
    rows = OFFICIAL.rows(file, option)
    convert = converter(file or OFFICIAL.hub_id, rows[0][1], "question", "answer")
    records = [convert(row, place) for place, row in rows]
    _require_gold(records, "Give the official test file")
    return records


def as_published(record: Record) -> Record:
    """The same problem as the scripts of LoRA-GA and LoRA-One ask it: "Q: ...", a new line, "A: "; one that is written
    so already stays as it is."""
    question, answer = record.messages[-2:]
    return replace(record, messages=(Message("user", asked(question_of(question.content))), answer))


def _require_gold(records: Sequence[Record], step: str) -> None:
    for record in records:
        if record.answer is None:
            raise DataError(f"{record.place}: the answer does not end in '#### <number>'. {step}.")


def _read(source: Source, settings: Gsm8kSettings) -> list[Record]:
    """The problems of a file or of the official test set, or the first ``size``."""
    if source.name is None:
        records = official_problems(None)
    else:
        records = records_to_measure(source.name, dict(source.columns))
        _require_gold(records, "Mend the row, or measure task=perplexity")
    return _asks(records, settings)


GSM8K = Evaluation(
    asks=_asks,
    check=_check,
    measure=_measure,
    read=_read,
    answer_length=_length,
    needs=frozenset({TEXT}),
    settings=Gsm8kSettings,
)
