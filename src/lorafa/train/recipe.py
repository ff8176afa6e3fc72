"""The main job, top to bottom: model, records, adapter, scores before, training, scores after."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import set_seed

from lorafa.data.chat import Sample
from lorafa.data.classes import classes_beside
from lorafa.data.collate import Tokenized
from lorafa.data.packing import Packs
from lorafa.data.prepared import SampleSet
from lorafa.data.templates import find_template
from lorafa.errors import ConfigError, DataError, DivergedError
from lorafa.evals.entry import Subject
from lorafa.evals.forgetting import check_forgetting
from lorafa.models.head_loss import Trial, supports_chunked_loss
from lorafa.models.load import check_samples, on_accelerator
from lorafa.models.packed import mixes_samples
from lorafa.peft_model import PeftModel
from lorafa.processes import is_main, main_first, world_size
from lorafa.storage.paths import user_path
from lorafa.surgery.merge import require_mergeable
from lorafa.train.adapter_config import lora_config
from lorafa.train.base_model import BaseModel, fetch_base, load_base, trained_whole, with_kind_of
from lorafa.train.checkpoints import step_of
from lorafa.train.coverage import coverage, coverage_table
from lorafa.train.evaluation import Chosen, check_kind, evaluation_of
from lorafa.train.fit import check_length, fit
from lorafa.train.keeping import Recorder, save, save_merged
from lorafa.train.measuring import forgotten, measure, side_by_side
from lorafa.train.objectives.making import (
    check_model,
    check_objective,
    check_rows,
    kind_wanted,
    make_rows,
    samples_of_pass,
)
from lorafa.train.objectives.work import as_it_was
from lorafa.train.prepared import Prepared, counted
from lorafa.train.progress import RunCallback, progress_bar
from lorafa.train.reach import check_reach
from lorafa.train.records import answers_of, find_records, make_samples, show_samples
from lorafa.train.sampling import lengths_of
from lorafa.train.settings.run import RunConfig, TrainConfig
from lorafa.train.settings.schedules import SCHEDULES
from lorafa.train.sharding import require_known, spread_over_processes
from lorafa.train.start import begin
from lorafa.train.teacher import Decisions
from lorafa.train.trackers import names_in
from lorafa.train.trackers.entry import Reported, named_trackers, reporting


def prepare(config: RunConfig, console: Console, before_loading: Callable[[], None] | None = None) -> Prepared:
    """Load model and records, put the adapter on, show what it covers and one sample. Writes nothing but to
    the cache.

    Args:
        before_loading: called when the records are found and the model is there, before its weights are loaded.

    Raises:
        LoraError: of the kind that fits: a setting, a source, the data or a target pattern is wrong.
    """
    started = time.monotonic()
    require_known(os.environ, config.peft.full)
    named_trackers(config.report_to)
    if not config.peft.full:
        _require_one_quantizer(config)  # what is wrong with the settings is said before anything is loaded
    check_objective(config)
    template = find_template(config.data.template) if config.data.template else None
    with main_first():
        data = find_records(config.data, config.objective.entry.reading)
    with console.status(f"Loading {escape(config.model.name)}"):
        fetch_base(config.model)
        if before_loading is not None:
            before_loading()
        adapter = config.peft.adapter
        named = kind_wanted(with_kind_of(config.model, adapter), config)
        classes = None if adapter is None else classes_beside(adapter)
        whole = (config.peft.modules_to_save or []) if adapter is None else trained_whole(user_path(adapter))
        base = load_base(named, config.train.seed, lambda: answers_of(data), classes, whole)
    if base.quantized is not None:
        console.print(base.quantized.in_words(), highlight=False)
    tokenizer, kind, encoding = base.tokenizer, base.kind, config.objective.entry.encoding or base.encoding
    check_model(kind, config)
    evaluation = evaluation_of(config.eval, kind)
    check_kind(kind, base.new_modules, evaluation, config, console)
    if not spread_over_processes(os.environ):
        on_accelerator(base.model)  # what is measured first is measured there
    if template is not None:
        tokenizer.chat_template = template
    with main_first():  # what the first process tokenizes is in the cache then
        samples = make_samples(data, tokenizer, config.data, console, encoding)
    own = make_rows(data, tokenizer, config)
    if own is not None:
        samples = replace(samples, sha256=own.sha256)
    rows = batch_rows(samples.train.samples, config)
    _check_samples(samples, len(rows) if own is None else samples_of_pass(own, config), base, evaluation, config)
    set_seed(config.train.seed)
    collator = kind.collator(tokenizer.pad_token_id or 0)  # masked by position: without one any other will do
    with console.status("Starting the adapter"):
        begun = begin(base, samples, collator, config)
    covered = coverage(begun.model)
    console.print(coverage_table(covered))
    show_samples(samples, tokenizer, console, encoding, learnt=own is None)
    if isinstance(begun.model, PeftModel):
        check_reach(begun.model, samples.train.samples, console, packed=config.train.packing)
        if config.train.save_merged:
            require_mergeable(begun.model)
    if own is not None:
        check_rows(own, begun.model, config, console)
    if config.train.packing:
        _check_packed(begun.model, rows, len(samples.train.samples), console)
    if world_size() > 1:
        console.print(_batch_in_words(config.train), highlight=False)
    chunked = config.train.chunked_loss and kind.row_losses() is None and config.objective.entry.answers
    trial = Trial(supports_chunked_loss(begun.model)) if chunked else None
    seconds = time.monotonic() - started
    kinds = [asdict(row) for row in covered]
    return Prepared(
        begun.model, tokenizer, samples, rows, collator, seconds, evaluation, kind, base.quantized, kinds,
        begun.record, begun.teacher, trial, own,
    )  # fmt: skip


def _require_one_quantizer(config: RunConfig) -> None:
    """Raises ConfigError where both the start and ``model.quantize`` quantize the base; and what lora_config raises."""
    quantizes = lora_config(config).start.initializer.quantizer is not None
    if quantizes and config.model.quantize is not None and config.peft.adapter is None:
        raise ConfigError(
            f"init.mode={config.init.mode} quantizes the dense base as it needs it, and model.quantize="
            f"{config.model.quantize} would have done so before. Drop one of the two."
        )


def _check_samples(samples: SampleSet, rows: int, base: BaseModel, evaluation: Chosen, config: RunConfig) -> None:
    """Raises LoraError, of the kind that fits, for samples that the run cannot train on or measure.

    Args:
        rows: of batches; see :func:`batch_rows`.
    """
    if not samples.records and (wants := _wants_heldout(config)):
        raise DataError(
            f"{wants} goes by held-out rows, and none of {samples.source} are held out. Set data.eval_size or "
            "data.eval_file, or leave it out."
        )
    check_length(config, rows)
    both = [*samples.train.samples, *samples.heldout.samples]
    check_samples(base.model, samples.lengths, samples.highest, lambda: base.kind.longest(both))
    asked = evaluation.entry.asks(samples.records, evaluation.own)
    evaluation.entry.check(Subject(base.model, base.tokenizer), asked, evaluation.own)
    if config.eval.forgetting:
        check_forgetting(base.model, base.tokenizer)


def batch_rows(samples: Sequence[Sample], config: RunConfig) -> Sequence[Tokenized]:
    """What batches are made of."""
    if not config.train.packing:
        return samples
    return Packs(samples, lengths_of(samples), config.data.max_length)


def _check_packed(model: Any, rows: Sequence[Tokenized], samples: int, console: Console) -> None:
    """Raises ConfigError for a model that does not keep the samples of a row apart; else says how many rows there are.
    """
    if reason := mixes_samples(model):
        raise ConfigError(
            f"train.packing=true needs a model that keeps the samples of a row apart, and with this one they would not "
            f"be trained as they are: {reason}. Leave it out; train.group_by_length pads little, too."
        )
    console.print(f"Packed: {samples:,} samples in {len(rows):,} rows.", highlight=False)


def train(
    prepared: Prepared, config: RunConfig, run: Recorder, console: Console, checkpoint: Path | None = None
) -> None:
    """Measure, train, save the adapter, measure again; every number is recorded as soon as it is known.

    Args:
        checkpoint: continue from there; what was measured before the first part is taken from the record.

    Raises:
        TrainingError: the loss is not finite, or nothing is learnt.
        CheckpointError: the checkpoint does not fit, or a file could not be written.
        DataError: the samples are not those the run began with.
    """
    earlier = run.result()
    _require_same_samples(prepared, earlier.get("samples_sha256"))
    run.update_result(
        source=prepared.data.source,
        samples_sha256=prepared.data.sha256,
        kind=prepared.kind.name,
        **({"classes": list(classes)} if (classes := prepared.kind.classes_in(prepared.model)) else {}),
        rows=prepared.counted(),
        parameters=counted(prepared.model),
        coverage=prepared.covered,
        **({} if prepared.quantized is None else {"quantized": asdict(prepared.quantized)}),
        **({"start": prepared.start} if prepared.start else {}),
    )
    seconds: dict[str, float] = {**earlier.get("seconds", {}), "prepare": round(prepared.seconds, 1)}
    before = earlier.get("before")
    if before is None and config.eval.before:
        goes_on = config.peft.full or config.peft.adapter is not None
        as_it_starts = nullcontext() if goes_on else prepared.model.disable_adapter()
        with _timed(seconds, "evaluate before"), as_it_starts:
            before = measure(prepared, config, console, "Before")
        run.update_result(before=before, seconds=seconds)
    logged = run.metrics()
    trained_before = logged[-1].get("seconds", 0.0) if logged else 0.0
    named, reported = named_trackers(config.report_to), _reported(run, config, checkpoint)
    with (
        _timed(seconds, "train", trained_before),
        progress_bar(console, "Training") as bar,
        reporting(named if is_main() else [], reported) as trackers,
    ):
        callbacks = [RunCallback(run.add_metrics, bar, trained_before, config.objective.entry.metrics), *trackers]
        told = {key: value for tracker in named for key, value in tracker.arguments(reported).items()}
        material = prepared.material(config, Decisions(run, step_of(checkpoint)))
        with nullcontext() if prepared.rows is None else as_it_was(prepared.model):
            fitted = fit(material, config, run.checkpoints, callbacks, checkpoint, run_name=run.path.name, **told)
    if fitted.stopped:
        console.print(f"Stopped after step {fitted.steps}: {fitted.stopped}.", highlight=False)
    kept = save(prepared.trained(), config, run)
    parameters = counted(prepared.model)  # again: LoRA-FA's optimizer has frozen A meanwhile
    if fitted.kept is not None:
        measured = prepared.data.heldout.samples[: config.train.eval_size]
        run.update_result(kept_step=fitted.kept, kept_by_rows=len(measured))
    run.update_result(steps=fitted.steps, stopped=fitted.stopped, **kept, seconds=seconds, parameters=parameters)
    with _timed(seconds, "evaluate after"):
        after = measure(prepared, config, console, "After")
        if config.eval.forgetting:
            after["forgetting"] = forgotten(prepared, config, console)
    answers, answers_before = after.pop("answers"), before and before.pop("answers", None)
    samples = earlier.get("samples", []) if answers_before is None else side_by_side(answers_before, answers)
    run.update_result(before=before, after=after, samples=samples, seconds=seconds)
    if not math.isfinite(after.get("loss", 0.0)):
        raise DivergedError(
            f"After the training the held-out loss is {after['loss']}, so the run has no result. What was trained is "
            f"kept in {run.path / next(iter(kept.values()))}. Lower the learning rate, or clip gradients "
            "(optim.max_grad_norm)."
        )
    if config.train.save_merged:
        with console.status("Saving the merged model"):
            lost = save_merged(prepared.trained(), config, run)
        if lost is not None:
            console.print(lost.in_words(), highlight=False)
        run.update_result(merged=run.merged.name, **({} if lost is None else {"merging": asdict(lost)}))


def _require_same_samples(prepared: Prepared, began_with: str | None) -> None:
    """Raises DataError for samples that are not those with this SHA-256; None: the run has had none yet."""
    if began_with not in (None, prepared.data.sha256):
        raise DataError(
            f"{prepared.data.source} does not give the samples this run began with, so what follows would not "
            "continue it. Restore the records and the tokenizer, or start a new run."
        )


def _reported(run: Recorder, config: RunConfig, checkpoint: Path | None) -> Reported:
    """What trackers are told; the name of the run among others is found once, and kept."""
    identity = run.result().get("reported_as") or uuid.uuid4().hex[:16]
    if names_in(config.report_to):
        run.update_result(reported_as=identity)
    return Reported(run.path, config.report_project, step_of(checkpoint), identity)


def _wants_heldout(config: RunConfig) -> str | None:
    """The setting that needs held-out rows during the training."""
    train, schedule = config.train, config.optim.schedule
    wants = {
        "train.keep_best": train.keep_best,
        "train.eval_every": train.eval_every,
        "train.eval_epochs": train.eval_epochs,
        f"optim.schedule={schedule}": SCHEDULES.get(schedule).measured,
        "align.schedule=cyclic": config.align.teaches and config.align.schedule == "cyclic",
    }
    return next((name for name, wanted in wants.items() if wanted), None)


def _batch_in_words(train: TrainConfig) -> str:
    whole = train.batch_size * train.accumulation * world_size()
    passes = f" x {train.accumulation} forward passes" if train.accumulation > 1 else ""
    return f"A step is of {whole} samples: {train.batch_size} in each of {world_size()} processes{passes}."


@contextmanager
def _timed(seconds: dict[str, float], name: str, before: float = 0.0) -> Iterator[None]:
    """Enter how long the block took, ``before`` included, under ``name``."""
    started = time.monotonic()
    yield
    seconds[name] = round(before + time.monotonic() - started, 1)
