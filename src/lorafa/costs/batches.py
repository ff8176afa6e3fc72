"""The largest batches of a run: of its own rows where they and a tokenizer can be had, else as its settings bound them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafa.data.chat import IGNORE
from lorafa.data.collate import Collate
from lorafa.data.packing import PackCollator
from lorafa.data.templates import find_template
from lorafa.evals.entry import Subject
from lorafa.evals.generation import context_of, longest_of
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.entry import Kind
from lorafa.models.load import load_tokenizer
from lorafa.train.base_model import cache_of
from lorafa.train.evaluation import Chosen, evaluation_of
from lorafa.train.fit import steps_in_all
from lorafa.train.recipe import batch_rows
from lorafa.train.records import make_samples
from lorafa.train.sampling import LengthSampler, OrderSampler, lengths_of
from lorafa.train.settings.run import RunConfig

if TYPE_CHECKING:
    from lorafa.data.prepared import SampleSet
    from lorafa.data.sources import OpenData


@dataclass(frozen=True)
class Batch:
    """A batch by its sizes."""

    rows: int
    tokens: int
    """The length of the longest row, to which the others are padded."""
    supervised: int
    """Positions in it that are trained on."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of each of its tensors, by name; empty: ids, mask and labels, (rows, tokens) each."""


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


def bounds(config: RunConfig, model: Any, why: str, kind: Kind = CAUSAL) -> Batches:
    """The largest batches that the settings allow.

    Args:
        model: of that kind, on the meta device; its context bounds the rows.
        why: the rows are not read.
    """
    context = context_of(model)
    longest = min(config.data.max_length, context or config.data.max_length)

    def whole(rows: int) -> Batch:
        return _batch([kind.fullest(longest)] * rows, kind, kind.collator(0))

    new = _new_tokens(evaluation_of(config.eval, kind), Subject(model, None), [], [])
    held = config.data.eval_size != 0 or config.data.eval_file is not None
    apart = kind.row_losses() is not None  # an answer is no part of what its prompt is
    prompt = longest if apart else max(1, longest - new)
    answered = Asked(config.eval.batch_size, prompt, new) if new and held else None
    heldout = whole(config.eval.batch_size) if held else None
    source = f"the bounds of the settings, rows of {longest:,} tokens ({why})"
    return Batches(whole(config.train.batch_size), heldout, answered, config.train.steps, source)


def of_rows(config: RunConfig, found: OpenData, model: Any, kind: Kind, console: Console) -> Batches:
    """The largest batches of the rows of a run, tokenized as it would do it.

    Args:
        found: the records.
        model: of that kind, on the meta device; it is told which token pads.

    Raises:
        LoraError: the rows or the tokenizer cannot be had, or cannot be used.
    """
    tokenizer = _tokenizer(config, kind)
    kind.settle(model, tokenizer)
    samples = make_samples(found, tokenizer, config.data, console, kind.encoding(model))
    rows = batch_rows(samples.train.samples, config)
    steps = steps_in_all(config, len(rows))
    heldout = sorted(samples.heldout.samples, key=lambda sample: len(sample.input_ids), reverse=True)
    held, collator = heldout[: config.eval.batch_size], kind.collator(tokenizer.pad_token_id or 0)
    return Batches(
        _batch(_largest(config, rows, steps), kind, PackCollator(collator)),
        _batch(held, kind, collator) if held else None,
        _asked(config, samples, Subject(model, tokenizer), kind),
        steps,
        f"the rows of {samples.source}",
    )


def _tokenizer(config: RunConfig, kind: Kind) -> Any:
    """The tokenizer as a run has it."""
    tokenizer = load_tokenizer(
        config.model.name,
        cache_dir=cache_of(config.model),
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not kind.own_template:
        tokenizer.chat_template = None
    if config.data.template:
        tokenizer.chat_template = find_template(config.data.template)
    return tokenizer


def _largest(config: RunConfig, rows: Sequence[Any], steps: int) -> list[Any]:
    """The rows of the batch with the most positions among those of the training's first epochs."""
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

    return [rows[i] for i in max(batches, key=positions)]


def _batch(rows: Sequence[Any], kind: Kind, collator: Collate | PackCollator) -> Batch:
    made = collator(rows)
    labels = made["labels"] if kind.row_losses() is not None else made["labels"][:, 1:]
    shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    return Batch(len(rows), shapes["input_ids"][1], int((labels != IGNORE).sum()), shapes)


def _asked(config: RunConfig, samples: SampleSet, subject: Subject, kind: Kind) -> Asked | None:
    chosen = evaluation_of(config.eval, kind)
    records = chosen.entry.asks(samples.records, chosen.own) if samples.records else []
    if not records or chosen.entry.answer_length is None:
        return None
    prompts = kind.prompts(records, subject.tokenizer)
    new = _new_tokens(chosen, subject, records, prompts)
    return Asked(min(config.eval.batch_size, len(records)), longest_of(prompts), new)


def _new_tokens(chosen: Chosen, subject: Subject, records: Sequence[Any], prompts: list[list[int]]) -> int:
    """Tokens of the longest answer; 0 of an evaluation that writes none."""
    length = chosen.entry.answer_length
    return 0 if length is None else length(subject, records, chosen.own, prompts)
