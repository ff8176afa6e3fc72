"""Alignment: the joint loss of a batch as a training loop calls it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.maps.base import RepresentationMap
from lorafa.alignment.objective import JointObjective, MapTerm, final_norm
from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS
from lorafa.alignment.schedule import Constant, Cyclic, CyclicSettings, Decision, Probe, Schedule
from lorafa.alignment.teachers.base import Teacher, copied
from lorafa.alignment.teachers.external import External
from lorafa.errors import BackendError, ConfigError
from lorafa.models.head_loss import supervised_loss, supervised_nll, supports_chunked_loss
from lorafa.models.modes import evaluating
from lorafa.models.positions import Positions
from lorafa.settings.checks import check_choice, check_number


class Alignment:
    """Task and teacher together: J = CE + weight (divergence + map_weight map), a mean over supervised positions.

    Three lines of a loop of your own:

        alignment = Alignment(model, teacher="base")
        loss = alignment.loss(model, batch)      # in place of model(**batch).loss
        alignment.after_step(model, optimizer)   # after optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: str | nn.Module | Teacher = "base",
        *,
        weight: float = 0.5,
        divergence: str | Divergence | None = None,
        map: str | RepresentationMap | None = None,
        map_layers: tuple[int, ...] | None = None,
        map_weight: float = 0.1,
        schedule: str | CyclicSettings = "constant",
        steps: int | None = None,
        probe: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Take in the student as it is at the start of training.

        Args:
            model: the student, a causal language model of transformers with adapters.
            teacher: "base", "snapshot", "ema", "anchor", or another model, which is frozen.
            weight: of the discrepancy beside the task's loss; 0 is a plain training.
            divergence: of the distributions over next tokens, by name or made with settings; by default
                "masked_target" for the base as the teacher, else "fkl"; "none" compares inner states alone.
            map: a distance of inner states beside it, by name or made with settings; None for none.
            map_layers: after which layers; by default after half of them and after the last.
            map_weight: its share beside the divergence.
            schedule: "constant" for a teacher in every step, "cyclic" or its settings for phases that take turns.
            steps: optimizer steps of the whole training, which a cyclic schedule has to know.
            probe: batches with labels, the same each time, on which a cyclic schedule measures the student.

        Raises:
            ConfigError: a name or number without meaning, a teacher of another vocabulary, or of other layers, a cyclic
                schedule without ``steps`` or ``probe``.
            AdapterError: the model has nothing that the teacher could be made of.
            BackendError: one of the models cannot be cut before its head.
        """
        check_number("weight", weight, "a number >= 0", 0.0, closed="[")
        check_number("map_weight", map_weight, "a number >= 0", 0.0, closed="[")
        self.teacher = _teacher(teacher)
        self.divergence = _divergence(divergence, self.teacher)
        self.term = None if map is None else MapTerm(_map(map), map_layers or _half_and_last(model), float(map_weight))
        self.schedule = _schedule(schedule, float(weight), steps, probe)
        self.probe_batches = list(probe)
        self.last_divergence: float | None = None
        """The discrepancy of the last batch in the mean over its positions, without its weight; None where there was
        no teacher in it."""
        self.teacher_passes = 0
        """Batches that the teacher has read for training; those of probes are not among them."""
        self._kept: dict[str, Any] = {}
        self._norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
        if weight:
            self.teacher.begin(model)
            self._check(model)
        self.schedule.begin(float(weight), lambda: self.probe(model))
        if weight and isinstance(self.schedule, Cyclic):
            self._kept = _student(model, None)

    def _check(self, model: nn.Module) -> None:
        with self.teacher.running(model) as teaching:
            reasons = [(name, supports_chunked_loss(one)) for name, one in (("student", model), ("teacher", teaching))]
        for name, reason in reasons:
            if reason is not None:
                raise BackendError(f"The {name} cannot be cut before its head, which alignment needs: {reason}.")
        if self.term is not None and self.term.map.reads_lens:
            with self.teacher.running(model) as teaching:
                self._norms = final_norm(model), final_norm(teaching)
        if isinstance(self.teacher, External) and self.divergence is not None:
            sizes = [_vocabulary(one) for one in (model, self.teacher.model)]
            if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
                raise ConfigError(
                    f"The teacher has {sizes[1]:,} tokens and the student {sizes[0]:,}: their distributions over next "
                    "tokens cannot be compared. Take a teacher of the same vocabulary, or compare inner states alone: "
                    "divergence='none' and a map for any width (procrustes, gram)."
                )

    # ---- a step

    def loss(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        """The joint loss of a batch, a differentiable float32 scalar; see :func:`supervised_loss` for the arguments.

        Raises:
            DivergedError: the teacher gives inf or nan.
            As :func:`lorafa.models.head_loss.supervised_loss`.
        """
        self.last_divergence, share = None, self.schedule.share()
        if not share.teacher:
            return supervised_loss(model, batch, num_items=num_items)
        said = self.said(model, batch)
        self.teacher_passes += 1
        joint = self._joint(said, share.teacher, share.task)
        loss = supervised_loss(model, batch, num_items=num_items, objective=joint)
        self.last_divergence = joint.divergence_sum / max(len(said.rows), 1)
        return loss

    def discrepancy(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The discrepancy of a batch alone, without its weight: the mean over its supervised positions, differentiable.

        Raises:
            As :meth:`loss`.
        """
        return supervised_loss(model, batch, objective=self._joint(self.said(model, batch), 1.0, 0.0))

    def _joint(self, said: Positions, weight: float, task_weight: float) -> JointObjective:
        return JointObjective(said, self.divergence, self.term, weight, task_weight, self._norms)

    def said(self, model: nn.Module, batch: Mapping[str, Any]) -> Positions:
        """What the teacher's head reads at the supervised positions of a batch; without gradients and dropout."""
        kept = Positions(() if self.term is None else self.term.layers)
        with torch.no_grad(), evaluating(model), self.teacher.running(model) as teaching:
            supervised_nll(teaching, batch, objective=kept)
        return kept

    @property
    def rate(self) -> float:
        """The factor that the schedule wants on the learning rate of the next step."""
        return self.schedule.share().rate

    def after_step(self, model: nn.Module, optimizer: Optimizer | None = None) -> list[Decision]:
        """Take in a step of the student's optimizer, and do what the schedule has decided.

        Args:
            optimizer: its state is kept and brought back with the student's values, where it is given.

        Returns:
            What was decided, for the record.
        """
        self.teacher.after_step(model)
        decisions = self.schedule.after_step(lambda: self.probe(model))
        done = []
        for decision in decisions:
            if decision.roll_back:
                _bring_back(model, optimizer, self._kept)
            if decision.accept:
                self._kept = _student(model, optimizer)
            lost = self.teacher.refresh(model).discarded if decision.refresh and self.teacher.follows else 0.0
            done.append(replace(decision, discarded=lost))
        return done

    def probe(self, model: nn.Module) -> Probe:
        """What the student is on the rows of the probe: means over their supervised positions, without dropout."""
        task = divergence = 0.0
        count = 0
        for batch in self.probe_batches:
            said = self.said(model, batch)
            joint = self._joint(said, 0.0, 1.0)
            with evaluating(model):
                supervised_nll(model, batch, objective=joint)
            task, divergence = task + joint.task_sum, divergence + joint.divergence_sum
            count += len(said.rows)
        return Probe(task / count, divergence / count) if count else Probe(0.0, 0.0)

    # ---- going on

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a training to go on; tensors among it."""
        return {
            "teacher": self.teacher.state_dict(), "schedule": self.schedule.state_dict(), "kept": self._kept,
            "teacher_passes": self.teacher_passes,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept.

        Raises:
            CheckpointError: it is of another teacher, schedule or adapter.
        """
        self.teacher.load_state_dict(state["teacher"])
        self.schedule.load_state_dict(state["schedule"])
        self._kept, self.teacher_passes = state["kept"], state["teacher_passes"]


def _student(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """The student as it is, to come back to."""
    return {"values": copied(model), "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict())}


def _bring_back(model: nn.Module, optimizer: Optimizer | None, kept: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept["values"]:
                p.copy_(kept["values"][name])
    if optimizer is not None and kept["optimizer"] is not None:
        optimizer.load_state_dict(copy.deepcopy(kept["optimizer"]))


def _schedule(
    given: str | CyclicSettings, weight: float, steps: int | None, probe: Sequence[Mapping[str, Any]]
) -> Schedule:
    if given == "constant" or not weight:
        return Constant(weight)
    if isinstance(given, str):
        check_choice("schedule", given, ("constant", "cyclic"))
        given = CyclicSettings()
    if steps is None or not probe:
        raise ConfigError(
            "A cyclic schedule measures the student on fixed rows and has to know where the training ends. Pass probe, "
            "batches with labels, and steps."
        )
    return Cyclic(given, steps)


def _teacher(given: str | nn.Module | Teacher) -> Teacher:
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return External(given)
    if given == External.name:
        raise ConfigError("teacher='external' names no model. Pass the model itself, loaded.")
    return TEACHERS.get(given)()


def _divergence(given: str | Divergence | None, teacher: Teacher) -> Divergence | None:
    if isinstance(given, Divergence):
        return given
    if given == "none":
        return None
    return DIVERGENCES.get(given or teacher.divergence)()


def _map(given: str | RepresentationMap) -> RepresentationMap:
    return given if isinstance(given, RepresentationMap) else MAPS.get(given)()


def _half_and_last(model: Any) -> tuple[int, ...]:
    """After ceil(L / 2) of the L layers, and after all."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = int(base.config.get_text_config().num_hidden_layers)
    return tuple(dict.fromkeys((-(-layers // 2), layers)))


def _vocabulary(model: Any) -> int:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return int(base.get_output_embeddings().weight.shape[0])
