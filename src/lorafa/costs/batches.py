"""The largest batches of a run: of its own rows where they and a tokenizer can be had, else as its settings bound them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafa.data.chat import IGNORE, encode_prompts
from lorafa.evals import EVALS
from lorafa.evals.generation import needed_length
from lorafa.models.load import load_tokenizer
from lorafa.train.base_model import cache_of
from lorafa.train.fit import steps_in_all
from lorafa.train.recipe import batch_rows
from lorafa.train.records import find_records, make_samples
from lorafa.train.sampling import LengthSampler, OrderSampler, lengths_of
from lorafa.train.settings.run import RunConfig

if TYPE_CHECKING:
    from lorafa.data.prepared import SampleSet


@dataclass(frozen=True)
class Batch:
    """A batch by its sizes."""

    rows: int
    tokens: int
    """The length of the longest row, to which the others are padded."""
    supervised: int
    """Positions in it that are trained on."""


@dataclass(frozen=True)
class Asked:
    """A batch of prompts that are answered."""

    rows: int
    tokens: int
    """The length of the longest prompt."""
    new_tokens: int


@dataclass(frozen=True)
class Batches:
    """The largest batches of a run."""

    training: Batch
    heldout: Batch | None
    """The one of the answer loss; None where no rows are held out."""
    asked: Asked | None
    """The one that is answered; None where nothing is."""
    steps: int | None
    """How long the training is; None where that depends on rows which are not known."""
    source: str
    """What they were taken from, in words."""


def bounds(config: RunConfig, context: int | None, why: str) -> Batches:
    """The largest batches that the settings allow.

    Args:
        context: positions of the model; None where it has no bound.
        why: the rows are not read.
    """
    longest = min(config.data.max_length, context or config.data.max_length)

    def whole(rows: int) -> Batch:
        return Batch(rows, longest, rows * (longest - 1))

    new = _new_tokens(config, [], None)
    held = config.data.eval_size != 0 or config.data.eval_file is not None
    answered = Asked(config.eval.batch_size, max(1, longest - new), new) if new and held else None
    heldout = whole(config.eval.batch_size) if held else None
    source = f"the bounds of the settings, rows of {longest:,} tokens ({why})"
    return Batches(whole(config.train.batch_size), heldout, answered, config.train.steps, source)


def of_rows(config: RunConfig, console: Console) -> Batches:
    """The largest batches of the rows of a run, tokenized as it would do it.

    Raises:
        LoraError: the rows or the tokenizer cannot be had, or cannot be used.
    """
    found = find_records(config.data)
    tokenizer = load_tokenizer(config.model.name, cache_dir=cache_of(config.model), revision=config.model.revision)
    samples = make_samples(found, tokenizer, config.data, console)
    rows = batch_rows(samples.train.samples, config)
    steps = steps_in_all(config, len(rows))
    heldout = sorted(samples.heldout.samples, key=lambda sample: len(sample.input_ids), reverse=True)
    held = heldout[: config.eval.batch_size]
    return Batches(
        _largest(config, rows, steps),
        _batch(held) if held else None,
        _asked(config, samples, tokenizer),
        steps,
        f"the rows of {samples.source}",
    )


def _largest(config: RunConfig, rows: Sequence[Any], steps: int) -> Batch:
    """The batch with the most positions among those of the training's first epochs."""
    size, lengths, train = config.train.batch_size, lengths_of(rows), config.train
    packed = train.packing
    sampler: OrderSampler = (
        LengthSampler(lengths, size, train.seed, train.rules)
        if train.group_by_length
        else OrderSampler(len(lengths), train.seed, train.rules)
    )
    order, wanted = list(sampler), steps * train.accumulation
    batches = [order[at : at + size] for at in range(0, len(order), size)][:wanted]

    def positions(batch: Sequence[int]) -> int:
        return sum(lengths[i] for i in batch) if packed else len(batch) * max(lengths[i] for i in batch)

    return _batch([rows[i] for i in max(batches, key=positions)])


def _batch(rows: Sequence[Any]) -> Batch:
    trained = sum(label != IGNORE for row in rows for label in row.labels[1:])
    return Batch(len(rows), max(len(row.input_ids) for row in rows), trained)


def _asked(config: RunConfig, samples: SampleSet, tokenizer: Any) -> Asked | None:
    records = EVALS.get(config.eval.name).asks(samples.records, config.eval.own) if samples.records else []
    new = _new_tokens(config, records, tokenizer)
    if not new or not records:
        return None
    longest = max(map(len, encode_prompts(records, tokenizer)))
    return Asked(min(config.eval.batch_size, len(records)), longest, new)


def _new_tokens(config: RunConfig, records: Sequence[Any], tokenizer: Any) -> int:
    """Tokens of the longest answer; 0 of an evaluation that writes none."""
    said = getattr(config.eval.own, "max_new_tokens", 0)
    return needed_length(records, tokenizer) if said is None else int(said)
