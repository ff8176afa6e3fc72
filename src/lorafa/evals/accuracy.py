"""How many texts get their class: accuracy with its interval, Matthews correlation, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.backends.offload import device_of
from lorafa.data.chat import encoded
from lorafa.data.records import Record
from lorafa.data.sources import records_to_measure
from lorafa.errors import ConfigError
from lorafa.evals.by_length import Progress, by_length
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import context_of
from lorafa.evals.shares import in_words, share
from lorafa.models.kinds.entry import CLASSES
from lorafa.models.modes import evaluating
from lorafa.settings.checks import check_int

WINDOW = 512
"""Tokens of a text that are read where neither the settings nor the model say how many."""


@dataclass(frozen=True, kw_only=True)
class AccuracySettings:
    """How many texts are asked."""

    size: int | None = None
    """Records measured, at most; null all of them."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("size", self.size, at_least=1)


def matthews(table: Tensor) -> float:
    """The correlation of what was given and what is right, in [-1, 1], for any number of classes (Gorodkin 2004,
    doi:10.1016/j.compbiolchem.2004.09.006); 0 where one of the two is the same class everywhere.

    Args:
        table: (classes, classes), how often a row of the class was given the column's.
    """
    counts = table.to(torch.float64)
    total, right = counts.sum(), counts.diag().sum()
    given, gold = counts.sum(dim=0), counts.sum(dim=1)
    spread = (total**2 - given @ given) * (total**2 - gold @ gold)
    return float((right * total - given @ gold) / spread.sqrt()) if spread > 0 else 0.0


def _asks(heldout: Sequence[Record], settings: AccuracySettings) -> list[Record]:
    return list(heldout[: settings.size])


def _measure(
    subject: Subject, records: Sequence[Record], settings: AccuracySettings, batch_size: int, progress: Progress
) -> Scores:
    model, kind, longest = subject.model, subject.kind, _longest(subject)
    classes = kind.classes_in(model)
    texts = encoded(records, kind.encoding(model).make(subject.tokenizer, longest))
    samples = texts.samples
    collate, device = kind.collator(subject.tokenizer.pad_token_id or 0), device_of(model)

    def of_batch(numbers: list[int]) -> list[tuple[int, float]]:
        """(the class that is given, the loss of the right one) of each."""
        batch = {name: tensor.to(device) for name, tensor in collate([samples[n] for n in numbers]).items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return list(zip(logits.argmax(dim=-1).tolist(), losses.tolist(), strict=True))

    with evaluating(model):
        found = by_length(of_batch, [len(sample.input_ids) for sample in samples], batch_size, progress)
    table = torch.zeros(len(classes), len(classes), dtype=torch.long)
    right, answers = [], []
    for number, (record, sample) in enumerate(zip(records, samples, strict=True)):
        given, gold = found[number][0], sample.labels[-1]
        table[gold, given] += 1
        right.append(given == gold)
        said = {"question": record.question[-1].content, "gold": classes[gold], "output": classes[given]}
        answers.append({**said, "correct": given == gold})
    loss = sum(loss for _, loss in found) / len(found)
    numbers = {**share(right), "matthews": matthews(table), "cross_entropy": loss}
    numbers |= {"cut": texts.truncated, "max_length": longest}
    words = f"{in_words(right)}, Matthews correlation {numbers['matthews']:.3f}"
    if texts.truncated:
        words += f", {texts.truncated} texts cut at {longest} tokens"
    return Scores(words, numbers, answers, Measured("accuracy", [float(one) for one in right]))


def _longest(subject: Subject) -> int:
    """Tokens of a text that are read: what the settings say, as far as model and tokenizer go."""
    context = context_of(subject.model)
    said = subject.max_length or context or WINDOW
    return min(said, context or said, int(subject.tokenizer.model_max_length))


def _read(source: Source, settings: AccuracySettings) -> list[Record]:
    """The records of a file, all of them or the first ``size``."""
    if source.name is None:
        raise ConfigError("task=accuracy has no rows of its own. Give data=<file>, with a text and its class a row.")
    return _asks(records_to_measure(source.name, dict(source.columns)), settings)


ACCURACY = Evaluation(
    asks=_asks,
    check=lambda *_: None,
    measure=_measure,
    read=_read,
    cuts=True,
    needs=frozenset({CLASSES}),
    settings=AccuracySettings,
)
"""The share of texts that get their class."""
