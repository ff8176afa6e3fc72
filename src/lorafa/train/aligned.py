"""Trainers that hold the student close to a teacher: one base class before any trainer of transformers."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorafa.alignment.alignment import Alignment
from lorafa.alignment.schedule import Decision
from lorafa.errors import CheckpointError, ConfigError, first_line
from lorafa.processes import distributed, gathered
from lorafa.train.sharding import average_gradients
from lorafa.train.trainer import LoraTrainer, SupervisedTrainer

STATE = "alignment.pt"
"""The file of a checkpoint that has the teacher and where the schedule is."""


class AlignedLoss(nn.Module):
    """The joint loss where gradients are taken, and another loss where they are not: held-out rows have no teacher."""

    def __init__(self, plain: nn.Module, alignment: Alignment) -> None:
        super().__init__()
        self.plain, self.alignment = plain, alignment

    def forward(self, batch: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.alignment.loss(self.plain.model, batch, num_items)  # type: ignore[arg-type]
        loss: Tensor = self.plain(batch, num_items)
        return loss


class Aligning:
    """Put it before a trainer: ``class MyTrainer(Aligning, transformers.Trainer): ...``, which runs on one device;
    before a trainer of this package it runs in several processes.

    The training loss is the joint one of :class:`lorafa.alignment.Alignment`, evaluations are the trainer's own. The
    mean divergence since the last line stands in each line of the log as ``divergence``. A checkpoint holds the
    teacher and the state of the schedule, and a training that is resumed goes on in the middle of a phase.

    Args:
        alignment: of the model that is trained.
        on_decision: is told what the schedule has decided.

    Raises:
        ConfigError: the trainer's model has another loss than that of next tokens, a loss of its own is asked for, or
            there are several devices and the trainer is none of this package.
    """

    model: Any
    args: Any
    state: Any
    accelerator: Any
    _loss: Any

    def __init__(
        self, *args: Any, alignment: Alignment, on_decision: Callable[[Decision], None] | None = None, **settings: Any
    ) -> None:
        if not isinstance(alignment, Alignment):
            raise ConfigError(
                f"alignment is the lorafa.alignment.Alignment of the model, found {type(alignment).__name__}. Make one."
            )
        super().__init__(*args, **settings)
        self.alignment = alignment
        self._divergences: list[tuple[float, int]] = []
        """Sum and number of positions of each batch since the last line of the log."""
        plain = getattr(self, "_loss", None)
        if isinstance(plain, nn.Module):
            if getattr(self, "own_loss_reason", None) is not None:
                raise ConfigError(
                    "A teacher needs the loss at supervised positions, and this training uses the model's own: "
                    f"{self.own_loss_reason}. Train without a teacher (align=none)."  # type: ignore[attr-defined]
                )
            self._loss = AlignedLoss(plain, alignment)
        elif getattr(self, "label_smoother", None) is not None or getattr(self, "compute_loss_func", None) is not None:
            raise ConfigError(
                "label_smoothing_factor and compute_loss_func define another loss than the one a teacher is beside, "
                "and would not count. Leave them out, or train without a teacher."
            )
        elif self.args.n_gpu > 1 or self.accelerator.num_processes > 1:
            raise ConfigError(
                "A teacher on several devices needs a trainer whose loss is what they share, and that of transformers "
                "wraps the model itself. Take lorafa.train.aligned.AlignedTrainer, or put Aligning before a subclass "
                "of LoraTrainer or SupervisedTrainer."
            )
        self.add_callback(_Phases(alignment, on_decision))  # type: ignore[attr-defined]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        returns_outputs = kwargs.get("return_outputs", bool(args) and args[0])
        if hasattr(self, "_loss") or returns_outputs or not torch.is_grad_enabled():
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        else:
            loss = self.alignment.loss(model, inputs, kwargs.get("num_items_in_batch"))
        own = self.alignment
        if torch.is_grad_enabled() and own.last_divergence is not None:
            self._divergences.append((own.last_divergence * own.last_positions, own.last_positions))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums, self._divergences = gathered(self._divergences), []
            total, positions = (sum(pair[at] for own in sums for pair in own) for at in (0, 1))
            if positions:
                logs = {**logs, "divergence": total / positions}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the trainer's optimizer move what is trained beside the student too, without weight decay."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        own, moved = list(self.alignment.parameters()), {id(p) for g in optimizer.param_groups for p in g["params"]}
        if own and id(own[0]) not in moved:
            same = {key: value for key, value in optimizer.param_groups[0].items() if key == "algorithm"}
            optimizer.add_param_group({"params": own, "weight_decay": 0.0, **same})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state = self.alignment.state_dict()  # in all processes: each may have something to write
        if self.args.should_save:
            torch.save(state, Path(output_dir) / STATE)

    def _load_adapters(self, folder: Path) -> None:
        """As the trainer's, for layers that carry what they did then."""
        carry_as_in(folder, self.alignment)
        super()._load_adapters(folder)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise CheckpointError(
                f"{checkpoint} has no {STATE}: it was made without a teacher, and cannot be continued with one."
            )
        self.alignment.load_state_dict(_kept_in(path))


def carry_as_in(folder: Path, alignment: Alignment) -> None:
    """Let layers carry what they did when a checkpoint was written, so that its adapter fits them."""
    path = folder / STATE
    if path.is_file():
        alignment.carry_as(_kept_in(path))


def _kept_in(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds of an alignment.

    Raises:
        CheckpointError: the file is damaged, or is none of an alignment.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}. Resume from another checkpoint.") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no state of an alignment. Resume from another checkpoint.")
    return state


class _Phases(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells an alignment of each optimizer step, and gives the step the rate that the schedule wants."""

    def __init__(self, alignment: Alignment, on_decision: Callable[[Decision], None] | None) -> None:
        self.alignment, self.on_decision = alignment, on_decision
        self._rates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        known = self.alignment.schedule.steps
        if known is not None and known != state.max_steps:
            raise ConfigError(
                f"The schedule of the teacher was told of steps={known}, and the training has {state.max_steps}. Make "
                f"the Alignment with steps={state.max_steps}."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if distributed():
            average_gradients(list(self.alignment.parameters()))
        factor = self.alignment.rate
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if factor != 1.0:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        for parameter in self.alignment.parameters():
            parameter.grad = None  # the trainer does so with those of the model
        rates = [group["lr"] for group in optimizer.param_groups]
        for decision in self.alignment.after_step(model, optimizer):
            if decision.roll_back:  # the schedule of rates goes on
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
            if self.on_decision is not None:
                self.on_decision(decision)


class AlignedTrainer(Aligning, LoraTrainer):
    """:class:`LoraTrainer` with a teacher; it takes the arguments of both."""


class AlignedSupervisedTrainer(Aligning, SupervisedTrainer):
    """:class:`SupervisedTrainer`, which may train all weights, with a teacher."""
