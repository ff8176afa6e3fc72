"""GLUE as text to text (Raffel et al. 2020, arXiv:1910.10683): the word of the class that the model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lorafa.data import DATASETS
from lorafa.data.chat import WHOLE, encoded
from lorafa.data.records import Message, Record
from lorafa.data.sources import records_to_measure
from lorafa.errors import ConfigError, DataError, SourceError, first_line
from lorafa.evals.benchmark import asks_nothing, refuse_heldout
from lorafa.evals.by_length import Progress
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import context_of
from lorafa.evals.loss import row_losses
from lorafa.evals.shares import in_words, share
from lorafa.models.kinds.entry import LIKELIHOOD
from lorafa.settings.checks import check_int

Task = Literal["sst2", "cola", "qqp", "mrpc", "mnli", "qnli"]
"""Data sets of the same names; held out are their validation rows."""
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class GlueSettings:
    """Which task is asked."""

    task: Task | None = None
    """The task the rows are of."""
    size: int | None = None
    """Rows asked, at most; null all of them."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("eval.size", self.size, at_least=1)


def _task(settings: GlueSettings) -> str:
    if settings.task is None:
        raise ConfigError(f"task=glue is several tasks. Name one: eval.task=<{'|'.join(TASKS)}>.")
    return settings.task


def _read(source: Source, settings: GlueSettings) -> list[Record]:
    task = _task(settings)
    if source.name is None:
        try:
            return records_to_measure(task, {})[: settings.size]
        except SourceError as error:
            raise SourceError(
                f"{first_line(error).partition(' Next step:')[0]} Next step: check the connection, or give a copy of "
                f"the validation rows: data={task}.jsonl."
            ) from error
    entry = DATASETS.get(task)
    assert entry.read_heldout is not None
    found = entry.read_heldout(source.name)
    if found is None:
        raise DataError(f"{source.name} has not the columns of {task}. Give a file of its rows, as on the Hub.")
    return found.heldout[: settings.size]


def _check(subject: Subject, records: Sequence[Record], settings: GlueSettings) -> None:
    if not records:
        refuse_heldout("glue")


def _measure(
    subject: Subject, records: Sequence[Record], settings: GlueSettings, batch_size: int, progress: Progress
) -> Scores:
    task = _task(settings)
    labels, kind = DATASETS.get(task).labels, subject.kind
    answered = [_with_answer(record, label) for record in records for label in labels]
    samples = encoded(answered, kind.encoding(subject.model).make(subject.tokenizer, WHOLE)).samples
    context = context_of(subject.model)
    for sample in samples:
        longest = kind.longest([sample]) or len(sample.input_ids)
        if context is not None and longest > context:
            raise DataError(
                f"{sample.place}: the row has {longest} tokens, which exceeds the model's context of "
                f"{context}. Leave it out."
            )
    collator = kind.collator(subject.tokenizer.pad_token_id or 0)
    losses = row_losses(subject.model, samples, collator, batch_size, progress)
    return scored(records, [losses[at : at + len(labels)] for at in range(0, len(losses), len(labels))], task)


def _with_answer(record: Record, label: str) -> Record:
    """The record with that word as its answer."""
    return replace(record, messages=(*record.question, Message("assistant", label)))


def scored(records: Sequence[Record], losses: Sequence[Sequence[float]], task: str) -> Scores:
    """Accuracy of the likeliest word, and for each class how many of its rows were right.

    Args:
        losses: the negative log-likelihood of every class's word, in the order of the classes, summed over its tokens
            and the one that ends the answer.
    """
    labels = DATASETS.get(task).labels
    golds = [record.messages[len(record.question)].content for record in records]
    found = [labels[min(range(len(row)), key=row.__getitem__)] for row in losses]
    right = [one == gold for one, gold in zip(found, golds, strict=True)]
    numbers = {
        "eval_task": task,
        **share(right),
        "classes": {
            label: {
                "rows": golds.count(label),
                "chosen": found.count(label),
                "right": sum(one and gold == label for one, gold in zip(right, golds, strict=True)),
            }
            for label in labels
        },
    }
    answers = [
        {"question": record.question[-1].content, "gold": gold, "output": one, "correct": ok}
        for record, gold, one, ok in zip(records, golds, found, right, strict=True)
    ]
    return Scores(f"{task}: {in_words(right)}", numbers, answers, Measured("accuracy", list(map(float, right))))


GLUE = Evaluation(
    asks=asks_nothing,
    of_run=False,
    check=_check,
    measure=_measure,
    read=_read,
    needs=frozenset({LIKELIHOOD}),
    settings=GlueSettings,
)
"""A task of GLUE as text to text: accuracy of the class's word that the model finds likeliest."""
