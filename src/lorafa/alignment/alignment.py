"""Alignment: the joint loss of a batch as a training loop calls it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.alignment.chosen import (
    chosen_divergence,
    chosen_layers,
    chosen_map,
    chosen_probe,
    chosen_schedule,
    chosen_teacher,
    require_depth,
)
from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.gradients import norms, sketched, trained_linear
from lorafa.alignment.maps.base import RepresentationMap
from lorafa.alignment.objective import JointObjective, MapTerm, final_norm
from lorafa.alignment.projections import frozen, load_values, projections, require_trained
from lorafa.alignment.reorient import Carry, begin_anew
from lorafa.alignment.said import Said, Spoken
from lorafa.alignment.schedule import Cyclic, CyclicSettings, Decision, Phase, Probe
from lorafa.alignment.teachers.base import Teacher, copied, require_state, require_trained_as, trained
from lorafa.alignment.teachers.external import vocabulary_of
from lorafa.alignment.weighing import BALANCED, FIRST, Norms, Weighing, check_weight
from lorafa.errors import BackendError, CheckpointError, ConfigError
from lorafa.models.head_loss import supervised_loss, supervised_nll, supports_chunked_loss
from lorafa.models.modes import evaluating
from lorafa.processes import gathered
from lorafa.settings.checks import check_number


class Alignment:
    """Task and teacher together: J = CE + weight (divergence + map_weight map), a mean over supervised positions.

    Three lines of a loop of your own, and one where the map is trained (``map="proj"``)::

        alignment = Alignment(model, teacher="base")
        optimizer = AdamW([*trained, *alignment.parameters()])
        loss = alignment.loss(model, batch)      # in place of model(**batch).loss
        alignment.after_step(model, optimizer)   # after optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: str | nn.Module | Teacher = "base",
        *,
        weight: float | str = 0.5,
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
            teacher: "base", "snapshot", "ema", "anchor", another model, which is frozen, or
                :class:`lorafa.alignment.Cached`, what was kept of one.
            weight: of the discrepancy beside the task's loss; 0 is a plain training. "balanced" is read once of the
                gradients of both, and 0.5 until the teacher has one.
            divergence: of the distributions over next tokens, by name or made with settings; by default
                "masked_target" for the base as the teacher, else "fkl"; "none" compares inner states alone.
            map: a distance of inner states beside it, by name or made with settings; None for none.
            map_layers: after which layers; by default after half of them and after the last.
            map_weight: its share beside the divergence.
            schedule: "constant" for a teacher in every step, "cyclic" or its settings for phases that take turns.
            steps: optimizer steps of the whole training, which a cyclic schedule has to know.
            probe: batches with labels, the same each time, on which a cyclic schedule measures the student. In several
                processes all have the same.

        Raises:
            ConfigError: a name or number without meaning, a teacher of another vocabulary, or of other layers, a cyclic
                schedule without ``steps`` or ``probe``.
            AdapterError: the model has nothing that the teacher could be made of.
            BackendError: one of the models cannot be cut before its head.
        """
        check_weight("weight", weight)
        check_number("map_weight", map_weight, "a number >= 0", 0.0, closed="[")
        first = FIRST if isinstance(weight, str) else float(weight)
        self.teacher = chosen_teacher(teacher)
        self.divergence = chosen_divergence(divergence, self.teacher)
        self.term = None
        if map is not None:
            self.term = MapTerm(chosen_map(map), chosen_layers(map_layers, model), float(map_weight))
        elif self.divergence is None or map_layers is not None:
            raise ConfigError(
                "divergence='none' compares inner states alone, and map_layers says after which layers: both need a "
                "map. Name one, map='procrustes' for example."
            )
        self.probe_batches = chosen_probe(probe)
        self.schedule = chosen_schedule(schedule, first, steps, self.probe_batches)
        self.weighing = Weighing(weight == BALANCED, self.teacher.starts_as_student)
        self.last_divergence: float | None = None
        """The discrepancy of the last batch in the mean over its positions, without its weight; None where there was
        no teacher in it."""
        self.last_positions = 0
        """The positions of it."""
        self.teacher_passes = 0
        """Batches that the teacher has read for training; those of probes are not among them."""
        self.steps = 0
        """Steps of the optimizer that are done."""
        self.carry: Carry | None = None
        """What a reoriented phase carries; None where none is asked for."""
        self._kept: dict[str, Any] = {}
        self._norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
        self._pending: list[Decision] = []
        self._first_of_step = True
        self._batches: list[Mapping[str, Any]] = []  # of this step, where a phase may be reoriented after it
        if first:
            self.teacher.begin(model)
            self.teacher.settle(model, self.divergence, self.term is not None)
            self._check(model, named=map_layers is not None)
        self.schedule.begin(first, lambda: self.probe(model))
        if first and isinstance(self.schedule, Cyclic):
            self.carry = Carry(model) if self.schedule.settings.reorient else None
            self._kept = self._student(model, None)
            if not self.teacher.starts_as_student:
                self._pending += self._balanced(model, self.probe_batches)

    def _check(self, model: nn.Module, *, named: bool) -> None:
        sizes = [vocabulary_of(model), self.teacher.vocabulary()]
        compares = self.divergence is not None or (self.term is not None and self.term.map.one_vocabulary)
        if compares and sizes[0] and sizes[1] and abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):  # type: ignore[type-var,operator]
            raise ConfigError(
                f"The teacher has {sizes[1]:,} tokens and the student {sizes[0]:,}: their distributions over next "
                "tokens cannot be compared. Take a teacher of the same vocabulary, or compare inner states alone: "
                "divergence='none' and a map for any width (procrustes, gram)."
            )
        _require_cut("student", model)
        if not self.teacher.runs:
            return
        with self.teacher.running(model) as teaching:
            _require_cut("teacher", teaching)
            if self.term is not None:
                require_depth(self.term.layers, model, teaching, named=named)
            if self.term is not None and self.term.map.reads_lens:
                self._norms = final_norm(model), final_norm(teaching)
        if self.term is not None and self.term.map.projects:
            self.term = replace(self.term, projections=projections(model, self.teacher, self.term.layers))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained beside the student: the linear maps of ``map="proj"``, and nothing otherwise.

        Give them to the optimizer with the student's. They are in :meth:`state_dict`, and in no adapter's file.
        """
        for one in () if self.term is None else self.term.projections.values():
            yield from one.parameters()

    def tell(self, kind: str, why: str) -> None:
        """Let the record have a line more, with what the next step decides."""
        self._pending.append(Decision(self.steps, kind, self._phase, why))

    @property
    def _phase(self) -> Phase:
        return "teacher" if self.schedule.share().teacher else "task"

    # ---- a step

    def loss(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        """The joint loss of a batch, a differentiable float32 scalar; see :func:`supervised_loss` for the arguments.

        Raises:
            DivergedError: the teacher gives inf or nan.
            LoraError: as :func:`lorafa.models.head_loss.supervised_loss`.
        """
        self.last_divergence, share = None, self.schedule.share()
        begins, self._first_of_step = self._first_of_step, False
        if self.carry is not None:
            self._batches.append(batch)
        if not share.teacher:
            return supervised_loss(model, batch, num_items=num_items)
        if begins and not self.schedule.probes and self.weighing.due(self.steps):
            self._pending += self._balanced(model, [batch])
            share = self.schedule.share()
        said = self.said(model, batch)
        self.teacher_passes += self.teacher.runs
        joint = self._joint(said, share.teacher, share.task)
        loss = supervised_loss(model, batch, num_items=num_items, objective=joint)
        self.last_positions = len(said)
        self.last_divergence = joint.divergence_sum / max(len(said), 1)
        return loss

    def discrepancy(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The discrepancy of a batch alone, without its weight: the mean over its supervised positions, differentiable.

        Raises:
            LoraError: as :meth:`loss`.
        """
        return supervised_loss(model, batch, objective=self._joint(self.said(model, batch), 1.0, 0.0))

    def _joint(self, said: Said, weight: float, task_weight: float) -> JointObjective:
        return JointObjective(said, self.divergence, self.term, weight, task_weight, self._norms)

    def said(self, model: nn.Module, batch: Mapping[str, Any]) -> Said:
        """What the teacher says at the supervised positions of a batch; without gradients and dropout."""
        if (told := self.teacher.told(model, batch)) is not None:
            return told
        kept = Spoken(() if self.term is None else self.term.layers)
        alone = nullcontext() if self.carry is None else self.carry.without()
        with torch.no_grad(), evaluating(model), alone, self.teacher.running(model) as teaching:
            supervised_loss(teaching, batch, num_items=1, objective=kept)
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

        Raises:
            ConfigError: what is trained beside the student is not among the optimizer's parameters.
        """
        require_trained(self.parameters(), optimizer)
        self.steps += 1
        whole = self.carry.folded() if self.carry is not None and self.teacher.each_step else nullcontext()
        with whole:
            self.teacher.after_step(model)
        probes: list[Probe] = []

        def probe() -> Probe:
            probes.append(self.probe(model))
            return probes[-1]

        done, self._pending = self._pending, []
        for decision in self.schedule.after_step(probe):
            done += self._carried_out(decision, model, optimizer)
        if self.carry is not None and self.carry.on and self.schedule.finished:
            done.append(self._compressed("teacher", optimizer))
        if probes:
            done += self._balanced(model, self.probe_batches)
        self._first_of_step, self._batches = True, []
        return done

    def _carried_out(self, decision: Decision, model: nn.Module, optimizer: Optimizer | None) -> list[Decision]:
        done = []
        if decision.roll_back:
            if self.carry is not None:
                self.carry.drop()
            self._bring_back(model, optimizer)
        if decision.refresh and self.carry is not None and self.carry.on:
            done.append(self._compressed(decision.phase, optimizer))
        if decision.accept:
            self._kept = self._student(model, optimizer)
        lost = self.teacher.discarded if decision.refresh or decision.begins else 0.0
        if decision.refresh and self.teacher.follows:
            lost = self.teacher.refresh(model).discarded
            self.schedule.followed()
        done.insert(0, replace(decision, discarded=lost))
        if decision.begins and self.carry is not None:
            done += self._balanced(model, self.probe_batches)  # the joint loss of the phase that begins
            done.append(self._reoriented(self.carry, model, optimizer))
        return done

    def probe(self, model: nn.Module) -> Probe:
        """What the student is on the rows of the probe: means over their supervised positions, without dropout.

        In several processes it is what the first has found, so that all decide alike.
        """
        task = divergence = 0.0
        count = 0
        for batch in self.probe_batches:
            said = self.said(model, batch)
            joint = self._joint(said, 0.0, 1.0)
            with evaluating(model):
                supervised_nll(model, batch, objective=joint)
            task, divergence = task + joint.task_sum, divergence + joint.divergence_sum
            count += len(said)
        return gathered(Probe(task / count, divergence / count) if count else Probe(0.0, 0.0))[0]

    # ---- gradients

    def _balanced(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Decision]:
        """Read the weight of gradients on these batches, if that is still to be done and can be."""
        if not self.weighing.pending:
            return []

        def both() -> Norms:
            told = [self.said(model, batch) for batch in batches]
            task, align = (self._gradients(model, batches, told, *share) for share in ((0.0, 1.0), (1.0, 0.0)))
            return norms(task), norms(align)

        why = self.weighing.measure(both, self.steps)
        if why is None or self.weighing.weight is None:
            return []
        self.schedule.reweigh(self.weighing.weight)
        return [Decision(self.steps, "balanced", self._phase, why)]

    def _gradients(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], told: Sequence[Said], *share: float
    ) -> dict[str, dict[str, Tensor]]:
        """Sketches of the gradient of ``share[0]`` discrepancy + ``share[1]`` task, layer by layer."""

        def summed(model: nn.Module, number: int) -> tuple[Tensor, int]:
            joint = self._joint(told[number], *share)
            return supervised_loss(model, batches[number], num_items=1, objective=joint), len(told[number])

        with frozen(self.parameters()):
            return sketched(model, trained_linear(model), batches, summed)

    def _reoriented(self, carry: Carry, model: nn.Module, optimizer: Optimizer | None) -> Decision:
        told, share = [self.said(model, batch) for batch in self._batches], self.schedule.share()
        kept = carry.begin(self._gradients(model, self._batches, told, share.teacher, share.task), optimizer)
        why = f"the update of {len(carry.pairs)} layers is carried, and A follows the gradient of the joint loss"
        if kept:
            why += f" but in {kept}, whose gradient has fewer directions than their rank"
        return Decision(self.steps, "reoriented", "teacher", why)

    def _compressed(self, phase: Phase, optimizer: Optimizer | None) -> Decision:
        assert self.carry is not None
        lost = self.carry.end(optimizer)
        return Decision(self.steps, "compressed", phase, "what was carried is folded into A and B", discarded=lost)

    # ---- going on

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a training to go on; tensors among it. In several processes all call it."""
        return {
            "name": self.teacher.name, "teacher": self.teacher.state_dict(), "kept": self._kept,
            "schedule": self.schedule.state_dict(), "weighing": self.weighing.state_dict(),
            "teacher_passes": self.teacher_passes, "steps": self.steps,
            "map": [p.detach().clone() for p in self.parameters()],
            "carry": {} if self.carry is None else self.carry.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept. Load it before the model's own where a reoriented phase may go on in it.

        Raises:
            CheckpointError: it is of another teacher, schedule or adapter.
        """
        self.carry_as(state)
        self.teacher.load_state_dict(state["teacher"])
        self.schedule.load_state_dict(state["schedule"])
        self.weighing.load_state_dict(state["weighing"])
        if self.weighing.weight is not None and not self.schedule.probes:
            self.schedule.reweigh(self.weighing.weight)
        load_values(self.parameters(), state["map"])
        self._kept, self.teacher_passes, self.steps = state["kept"], state["teacher_passes"], state["steps"]
        self._pending, self._batches, self._first_of_step = [], [], True

    def carry_as(self, state: Mapping[str, Any]) -> None:
        """Let the layers carry what they did in a state that was kept, so that the adapter of that time fits them.

        Raises:
            CheckpointError: it carries something, and ``reorient`` is off here.
        """
        require_state(state, self.teacher.name)
        if self.carry is not None:
            self.carry.load_state_dict(state["carry"])
        elif state["carry"]:
            raise CheckpointError(
                "The checkpoint was written in a phase with align.reorient=true, and here it is off. Turn it on."
            )

    def _student(self, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
        """The student as it is, to come back to."""
        own = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        return {"values": copied(model), "map": [p.detach().clone() for p in self.parameters()], "optimizer": own}

    def _bring_back(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        kept = self._kept
        require_trained_as(model, kept["values"], "the student was last accepted")
        with torch.no_grad():
            for name, p in trained(model).items():
                p.copy_(kept["values"][name])
        load_values(self.parameters(), kept["map"])
        if optimizer is not None and kept["optimizer"] is None:  # as it was before its first step
            for state in optimizer.state.values():
                begin_anew(state)
        elif optimizer is not None:
            optimizer.load_state_dict(copy.deepcopy(kept["optimizer"]))


def _require_cut(name: str, model: nn.Module) -> None:
    reason = supports_chunked_loss(model)
    if reason is not None:
        raise BackendError(f"The {name} cannot be cut before its head, which alignment needs: {reason}.")
