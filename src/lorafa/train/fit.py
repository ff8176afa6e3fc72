"""The training itself: from the settings to a trainer that runs, is resumed, and stops where it is told to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from lorafa.alignment.chosen import require_room
from lorafa.alignment.schedule import Decision
from lorafa.data.collate import Tokenized
from lorafa.data.packing import PackCollator
from lorafa.models.head_loss import Trial
from lorafa.models.kinds.entry import RowLosses
from lorafa.processes import world_size
from lorafa.train.aligned import AlignedSupervisedTrainer, AlignedTrainer, carry_as_in
from lorafa.train.checkpoints import state_of, step_of
from lorafa.train.full import in_float32, load_weights, precision
from lorafa.train.settings.optim import check_rise, pair_optimizer, schedule_of_trainer, stock_arguments, warmup_of
from lorafa.train.settings.run import RunConfig
from lorafa.train.settings.schedules import SCHEDULES
from lorafa.train.teacher import Teach
from lorafa.train.trainer import LoraTrainer, SupervisedTrainer


@dataclass(frozen=True)
class Material:
    """What is trained, and on what."""

    model: Any
    """A PeftModel, or a model of transformers all of whose weights are trained."""
    train: Sequence[Tokenized]
    heldout: Sequence[Tokenized]
    collator: PackCollator
    decode: Callable[[list[int]], str]
    trial: Trial | None
    row_losses: RowLosses | None = None
    """The loss of a model that is not causal."""
    teach: Teach | None = None
    """How the alignment with a teacher is made; None: there is no teacher."""
    on_decision: Callable[[Decision], None] | None = None
    """Is told what the schedule of the teacher decides."""
    make: Callable[[Mapping[str, Any], Mapping[str, Any]], Any] | None = None
    """(what TrainingArguments are told, what a trainer is told beside) -> the trainer of an objective that is not ours;
    None: ours."""
    pass_length: int | None = None
    """How many samples a pass over the rows trains; None: as many as there are."""

    @property
    def samples(self) -> int:
        """How many samples a pass trains."""
        return len(self.train) if self.pass_length is None else self.pass_length


@dataclass(frozen=True)
class Fitted:
    """How a training ended."""

    steps: int
    """Optimizer steps of all its parts together."""
    stopped: str | None = None
    """Why it ended before its time."""
    kept: int | None = None
    """The step whose weights were kept, where ``train.keep_best`` chose one."""


class Patience(TrainerCallback):  # type: ignore[misc]
    """Ends the training where the held-out loss has not fallen for so many measurements.

    It goes by what was logged, which checkpoints keep: a resumed training stops where the original one would.
    """

    def __init__(self, measurements: int) -> None:
        self.measurements = measurements

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if run_out(state.log_history, self.measurements) is not None:
            control.should_training_stop = True


def run_out(log: Sequence[Mapping[str, Any]], patience: int | None) -> str | None:
    """Why a training with these measurements stops, in words; None where it goes on."""
    losses = [(row["eval_loss"], row["step"]) for row in log if "eval_loss" in row]
    if patience is None or not losses:
        return None
    best = min(range(len(losses)), key=lambda at: losses[at][0] if math.isfinite(losses[at][0]) else math.inf)
    if len(losses) - 1 - best < patience:
        return None
    loss, step = losses[best]
    return (
        f"the held-out loss has not fallen in {len(losses) - 1 - best} measurements since step {step}, where it was "
        f"{loss:.4f}"
    )


def steps_in_all(config: RunConfig, rows: int) -> int:
    """Optimizer steps of the training, over all processes."""
    train = config.train
    batches = math.ceil(rows / (train.batch_size * world_size()))
    return train.steps or math.ceil((train.epochs or 1) * math.ceil(batches / train.accumulation))


def check_length(config: RunConfig, rows: int) -> None:
    """Raises ConfigError where the warm-up is as long as the passes over that many rows, or a teacher never counts.

    A run that was begun when the first was no error is continued all the same.
    """
    if config.align.teaches and config.align.schedule == "cyclic":
        require_room(config.align.phases(), steps_in_all(config, rows))
    if config.train.rules > 1:
        steps = steps_in_all(config, rows)
        check_rise(config.optim, steps, f"train.epochs={config.train.epochs or 1:g}, {steps} steps")


def in_steps(config: RunConfig, rows: int) -> RunConfig:
    """The settings with all that depends on the number of rows written in steps."""
    train, steps = config.train, steps_in_all(config, rows)
    rows_of_step = train.batch_size * train.accumulation * world_size()
    of_epoch = math.ceil(math.ceil(rows / (train.batch_size * world_size())) / train.accumulation)
    checkpoint_every, eval_every = train.checkpoint_every, train.eval_every
    if train.checkpoint_epochs is not None:  # where an epoch ends
        checkpoint_every = max(1, int(of_epoch * train.checkpoint_epochs))
    if train.eval_epochs is not None:  # as published scripts count: whole rows, then whole batches
        eval_every = max(1, int(rows * train.eval_epochs) // rows_of_step)
    if train.keep_best:
        eval_every = checkpoint_every
    return replace(
        config,
        train=replace(
            train,
            checkpoint_every=checkpoint_every,
            checkpoint_epochs=None,
            eval_every=eval_every,
            eval_epochs=None,
        ),
        optim=replace(config.optim, warmup=warmup_of(config.optim, steps)),
    )


def training_arguments(config: RunConfig, output_dir: Path, **more: Any) -> TrainingArguments:
    """The settings as `transformers.Trainer` takes them, and ``more`` of its own."""
    return TrainingArguments(**training_settings(config, output_dir), **more)


def training_settings(config: RunConfig, output_dir: Path) -> dict[str, Any]:
    """What `transformers.TrainingArguments` are told."""
    train, optim = config.train, config.optim
    options: dict[str, Any] = {"save_strategy": "no"}
    if train.checkpoint_every:
        options = {"save_strategy": "steps", "save_steps": train.checkpoint_every}
        options["save_total_limit"] = train.keep_checkpoints
    if train.gradient_checkpointing:
        options["gradient_checkpointing"] = True
    if train.measures:
        options |= {"eval_strategy": "steps", "eval_steps": train.eval_every or train.checkpoint_every}
    if train.keep_best or SCHEDULES.get(optim.schedule).measured:
        options |= {"metric_for_best_model": "loss", "greater_is_better": False}
    if train.keep_best:
        options["load_best_model_at_end"] = True
    return dict(
        output_dir=str(output_dir),
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs or 1,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=config.eval.batch_size,
        gradient_accumulation_steps=train.accumulation,
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        seed=train.seed,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=train.log_every,
        logging_first_step=True,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        **schedule_of_trainer(optim),
        **stock_arguments(optim),
        **options,
    )


def fit(
    material: Material,
    config: RunConfig,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback],
    checkpoint: Path | None,
    **arguments: Any,
) -> Fitted:
    """Train, from a checkpoint where there is one; ``arguments`` go to `transformers.TrainingArguments` as they are."""
    settled = in_steps(config, material.samples)
    if material.make is not None:
        told = {**training_settings(settled, output_dir), **arguments}
        return _fit(material, partial(material.make, told), config, callbacks, checkpoint)
    if not config.peft.full:
        made = training_arguments(settled, output_dir, **arguments)
        kind = LoraTrainer if material.teach is None else AlignedTrainer
        return _fit(material, partial(_own_trainer, material, kind, config, made), config, callbacks, checkpoint)
    with in_float32(material.model) as stored:
        made = training_arguments(settled, output_dir, **arguments, **precision(stored))
        whole = SupervisedTrainer if material.teach is None else AlignedSupervisedTrainer
        return _fit(material, partial(_own_trainer, material, whole, config, made), config, callbacks, checkpoint)


def _own_trainer(
    material: Material,
    trainer_class: type[SupervisedTrainer],
    config: RunConfig,
    arguments: TrainingArguments,
    more: Mapping[str, Any],
) -> SupervisedTrainer:
    aligned: dict[str, Any] = {}
    if material.teach is not None:
        alignment = material.teach(steps_in_all(config, material.samples))
        aligned = {"alignment": alignment, "on_decision": material.on_decision}
    return trainer_class(
        material.model,
        arguments,
        chunked_loss=config.train.chunked_loss or material.row_losses is not None,
        trial=material.trial,
        rules=config.train.rules,
        decode=material.decode,
        row_losses=material.row_losses,
        train_dataset=material.train,
        eval_dataset=material.heldout[: config.train.eval_size] if config.train.measures else None,
        data_collator=material.collator,
        optimizers=(pair_optimizer(material.model, config.optim), None),  # after the teacher has seen what is trained
        **aligned,
        **more,
    )


def _fit(
    material: Material,
    make: Callable[[Mapping[str, Any]], Any],
    config: RunConfig,
    callbacks: Sequence[TrainerCallback],
    checkpoint: Path | None,
) -> Fitted:
    state = state_of(checkpoint) if checkpoint else {}
    steps, stopped = int(state.get("global_step", 0)), run_out(state.get("log_history", ()), config.train.patience)
    in_all = steps_in_all(config, material.samples)
    if checkpoint and (stopped or steps >= in_all):
        # Its last part was all but done; transformers would take one step more.
        best = state.get("best_model_checkpoint")
        chosen = checkpoint.with_name(Path(best).name) if best else checkpoint  # wherever the run has been moved to
        if material.teach is not None and config.align.reorient:  # the best may be of the middle of a phase
            carry_as_in(chosen, material.teach(in_all))
        _load(material.model, chosen, config)
        pair_optimizer(material.model, config.optim)  # which freezes what it does not train
        return Fitted(steps, stopped, _kept(config, best))
    patience = [] if config.train.patience is None else [Patience(config.train.patience)]
    trainer = make({"callbacks": [*callbacks, *patience]})
    trainer.remove_callback(PrinterCallback)  # the bar and the record say it
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    done = trainer.state.global_step
    early = done < trainer.state.max_steps
    stopped = run_out(trainer.state.log_history, config.train.patience) if early else None
    return Fitted(done, stopped, _kept(config, trainer.state.best_model_checkpoint))


def _kept(config: RunConfig, best: str | None) -> int | None:
    return step_of(Path(best)) if config.train.keep_best and best else None


def _load(model: Any, checkpoint: Path, config: RunConfig) -> None:
    if config.peft.full:
        load_weights(model, checkpoint)
    else:
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
