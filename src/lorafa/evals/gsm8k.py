"""Exact-match accuracy on problems whose answer is a number (GSM8K and its like)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from lorafa.data.chat import encode_prompts
from lorafa.data.records import Record, final_answer, last_number
from lorafa.errors import ConfigError, DataError, did_you_mean
from lorafa.evals.entry import Evaluation, Scores, Subject
from lorafa.evals.generation import Progress, Sampling, check_prompts, generate_ids
from lorafa.evals.sample_answers import SHOWN, sample_answers, with_question
from lorafa.settings.checks import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalSample:
    """One question with what the model wrote; ``predicted`` is None when no answer could be read from it."""

    question: str
    gold: str
    output: str
    predicted: Decimal | None
    correct: bool


@dataclass(frozen=True)
class EvalResult:
    """``accuracy`` = correct / total, in [0, 1]; ``interval`` is its 95 % Wilson interval; ``unparsed`` counts outputs
    without a readable answer (they count as wrong). ``samples`` are in the order of the records."""

    accuracy: float
    correct: int
    total: int
    interval: tuple[float, float]
    unparsed: int
    samples: list[EvalSample]


def extract_answer(text: str) -> Decimal | None:
    """The number an answer ends in: the last one on the line after the last ``####`` or "The answer is".

    ``$ € £ , %`` are dropped, sign and decimals count. None when there is no such mark or no number after it.
    """
    line = final_answer(text)
    return None if line is None else last_number(line)


def extract_upstream(text: str) -> Decimal:
    r"""The rule of the LoRA-GA and LoRA-One scripts, to compare with their numbers: the first ``####\s*(\d+)``, else 0.

    It reads "1,234" as 1, and negative or missing answers as 0 (so 0 = 0 counts as correct).
    """
    match = re.search(r"####\s*(\d+)", text)
    return Decimal(match[1]) if match else Decimal(0)


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
        if last_number(gold) is None:
            raise DataError(
                f"A record has no number as its gold answer (found {record.answer!r}), so accuracy cannot be measured: "
                f"{record.messages[0].content[:60]!r}. Its last turn must end in '#### N'; without, measure the answer "
                "loss only."
            )
        if not record.question:
            raise DataError(
                f"A record asks nothing before its answer {gold!r}, so there is nothing to generate from. Leave it out."
            )
    prompts = encode_prompts(records, tokenizer)
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
        samples.append(EvalSample(question, gold, output, predicted, predicted == read(f"#### {gold}")))
    correct = sum(sample.correct for sample in samples)
    unparsed = sum(extract_answer(sample.output) is None for sample in samples)
    return EvalResult(
        correct / len(samples), correct, len(samples), wilson_interval(correct, len(samples)), unparsed, samples
    )


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Bounds of a proportion (Wilson 1927, JASA 22:209); ``z`` is the normal quantile, by default of 95 %."""
    share = correct / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if correct == 0 else (middle - half) / scale  # exactly: rounding would leave 3e-18
    return low, 1.0 if correct == total else (middle + half) / scale


@dataclass(frozen=True, kw_only=True)
class Gsm8kSettings:
    """How questions are asked and answers read."""

    size: int | None = 64
    """Held-out records answered by generation, at most: null all of them, 0 none. The answer loss is taken over all.
    Where none has an answer that can be graded, a few are answered for the report."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    extract: Literal["number", "upstream"] = "number"
    """How the final number is read: number, or upstream as the LoRA-GA scripts do, to compare with their accuracy."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("size", self.size, at_least=0)
        check_int("max_new_tokens", self.max_new_tokens, at_least=1)


def _asks(heldout: Sequence[Record], settings: Gsm8kSettings) -> list[Record]:
    """Those with a gold answer, up to ``size`` of them; where there are none at all, a few to look at."""
    graded = [record for record in heldout if record.answer is not None]
    return (graded or with_question(heldout))[: settings.size]


def _check(subject: Subject, records: Sequence[Record], settings: Gsm8kSettings) -> None:
    prompts = encode_prompts(records, subject.tokenizer)
    if _graded(records):
        check_prompts(subject.model, prompts, settings.max_new_tokens)


def _graded(records: Sequence[Record]) -> bool:
    return any(record.answer is not None for record in records)


def _measure(
    subject: Subject, records: Sequence[Record], settings: Gsm8kSettings, batch_size: int, progress: Progress
) -> Scores:
    if not _graded(records):
        answers = sample_answers(subject, records, settings.max_new_tokens, batch_size, progress)
        return Scores(f"{len(answers)} answers to look at", {}, answers)
    found = evaluate(
        subject.model,
        subject.tokenizer,
        records,
        batch_size=batch_size,
        max_new_tokens=settings.max_new_tokens,
        extract=settings.extract,
        ends=subject.ends,
        progress=progress,
    )
    answers = [
        {"question": one.question, "gold": one.gold, "output": one.output, "correct": one.correct}
        for one in found.samples[:SHOWN]
    ]
    numbers = {name: value for name, value in asdict(found).items() if name != "samples"}
    return Scores(f"{found.correct} of {found.total} right ({found.accuracy:.1%})", numbers, answers)


GSM8K = Evaluation(asks=_asks, check=_check, measure=_measure, settings=Gsm8kSettings)
