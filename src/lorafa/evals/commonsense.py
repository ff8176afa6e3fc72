"""The eight commonsense tasks in the form of LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): an answer is one word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafa.data.cells import text_of
from lorafa.data.chat import encode_prompts
from lorafa.data.records import Message, Record
from lorafa.errors import ConfigError, DataError
from lorafa.evals.benchmark import asks_nothing, refuse_heldout, require_columns
from lorafa.evals.by_length import Progress
from lorafa.evals.commonsense_rows import PUBLISHED
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import Sampling, check_prompts, generate_ids, sampling_of
from lorafa.evals.shares import in_words, share
from lorafa.settings.checks import check_int

_ANSWERS = r"answer[1-5]"
TASKS: Mapping[str, str] = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "social_i_qa": _ANSWERS,
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
    "ARC-Easy": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "openbookqa": _ANSWERS,
}
"""Task -> the words one of which is an answer, as a regular expression."""
COLUMNS = ("instruction", "answer")
FORM = "the published form, rows with instruction, output and answer (dataset/<task>/test.json of LLM-Adapters)"


@dataclass(frozen=True, kw_only=True)
class CommonsenseSettings:
    """Which task is asked, and how it is answered."""

    task: Literal[
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"
    ] | None = None  # fmt: skip
    """The task the questions are of."""
    size: int | None = None
    """Questions asked, at most; null all of them."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Tokens are drawn at this temperature; 0 takes the likeliest."""
    top_p: float = 1.0
    """Drawn among the likeliest tokens that have this probability together."""
    seed: int = 0
    """Seed of what is drawn."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("eval.size", self.size, at_least=1)
        check_int("eval.max_new_tokens", self.max_new_tokens, at_least=1)
        self.sampling()

    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None: not at all."""
        return sampling_of(self.temperature, self.top_p, self.seed or None, "eval.{}".format, "=")


def answer_in(text: str, task: str) -> str | None:
    """The first word that is an answer of the task; None where there is none."""
    match = re.search(TASKS[task], text)
    return match and match[0]


def _task(settings: CommonsenseSettings) -> str:
    if settings.task is None:
        raise ConfigError(f"task=commonsense is eight tasks. Name one: eval.task=<{'|'.join(TASKS)}>.")
    return settings.task


def _read(source: Source, settings: CommonsenseSettings) -> list[Record]:
    task = _task(settings)
    published = PUBLISHED[task]
    rows = published.official.rows(source.name, "data=test.json")
    if source.name is not None:
        require_columns(rows, COLUMNS, FORM)
    records = []
    for place, given in rows[: settings.size]:
        row = given if source.name is not None else published.row(given, place)
        gold = text_of(row, place, "answer").strip()
        if not re.fullmatch(TASKS[task], gold):
            raise DataError(f"{place}: the answer {gold!r} is none of {task} ({TASKS[task]}). Name its own eval.task.")
        asked = text_of(row, place, "instruction")
        if row.get("input"):
            asked = f"{asked}\n\n{text_of(row, place, 'input')}"
        messages = (Message("user", asked), Message("assistant", gold))
        records.append(Record(messages, answer=gold, place=place))
    return records


def _check(subject: Subject, records: Sequence[Record], settings: CommonsenseSettings) -> None:
    if not records:
        refuse_heldout("commonsense")
    check_prompts(subject.model, encode_prompts(records, subject.tokenizer), settings.max_new_tokens)


def _measure(
    subject: Subject, records: Sequence[Record], settings: CommonsenseSettings, batch_size: int, progress: Progress
) -> Scores:
    task, tokenizer = _task(settings), subject.tokenizer
    written = generate_ids(
        subject.model,
        tokenizer,
        encode_prompts(records, tokenizer),
        batch_size=batch_size,
        max_new_tokens=settings.max_new_tokens,
        ends=subject.ends,
        progress=progress,
        sampling=settings.sampling(),
    )
    outputs = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return scored(records, outputs, task)


def scored(records: Sequence[Record], outputs: Sequence[str], task: str) -> Scores:
    """Exact match of the first word that is an answer; outputs without one are counted, and wrong."""
    found = [answer_in(output, task) for output in outputs]
    right = [one == record.answer for one, record in zip(found, records, strict=True)]
    unparsed = found.count(None)
    numbers = {"eval_task": task, **share(right), "unparsed": unparsed}
    answers = [
        {"question": record.question[-1].content, "gold": record.answer, "output": output, "correct": one}
        for record, output, one in zip(records, outputs, right, strict=True)
    ]
    words = f"{task}: {in_words(right)}"
    words += f", {unparsed} without an answer" if unparsed else ""
    return Scores(words, numbers, answers, Measured("accuracy", list(map(float, right))))


COMMONSENSE = Evaluation(
    asks=asks_nothing, of_run=False, check=_check, measure=_measure, read=_read, settings=CommonsenseSettings
)  # fmt: skip
"""One of eight commonsense tasks: exact match of the word that names the answer."""
