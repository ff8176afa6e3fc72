"""Starts of the joint objective: gradients of task + lambda teacher, of two passes over the data, for any lambda.

Sketches are linear. So the gradient of the task's loss and that of the discrepancy to a teacher are sketched in one
pass each, and G_task + lambda G_align is formed of both without the data: by a weight that was given, or by one that
makes the teacher's gradient half as large as the task's (:func:`lorafa.alignment.balance.balanced_weight`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafa.alignment.balance import balanced_weight
from lorafa.alignment.registries import TEACHERS
from lorafa.alignment.teachers.base import Teacher
from lorafa.alignment.teachers.external import External
from lorafa.calibration import STATISTICS
from lorafa.calibration.base import CalibrationOptions, Measured
from lorafa.calibration.batches import Asked, Batches, contents, digest_of, shown
from lorafa.calibration.gradient import SUMS, GradientSketch
from lorafa.calibration.loss import Loss, default_loss
from lorafa.calibration.projections import Projections
from lorafa.errors import CalibrationError, ConfigError
from lorafa.processes import gathered
from lorafa.settings.checks import check_number
from lorafa.starts.statistics import Statistics, statistics_of
from lorafa.surgery.resolve import Resolved

if TYPE_CHECKING:
    from lorafa.alignment.alignment import Alignment
    from lorafa.alignment.divergences.base import Divergence
    from lorafa.alignment.maps.base import RepresentationMap

SAME = "the teacher {name!r} is the model itself where it starts, so its gradient is zero there"
QUIET = "the gradient of the teacher {name!r} is less than a thousandth of the task's"


@dataclass(frozen=True, kw_only=True)
class JointStart:
    """The teacher of a start, and what it counts beside the task.

    Raises:
        ConfigError: a number is out of its range.
    """

    teacher: str | nn.Module | Teacher
    """Another model, frozen, or a teacher of :mod:`lorafa.alignment` by name. Those that are made of the student itself
    (base, snapshot, ema, anchor) are where it starts: the start is the task's alone then."""
    divergence: str | Divergence | None = None
    """As for :class:`lorafa.alignment.Alignment`, as are the three that follow."""
    map: str | RepresentationMap | None = None
    map_layers: tuple[int, ...] | None = None
    map_weight: float = 0.1
    weight: float | None = None
    """lambda; None balances the two gradients."""
    rho: float = 0.5
    """How large the teacher's gradient is to be beside the task's, in the median layer, where they are balanced."""

    def __post_init__(self) -> None:
        check_number("rho", self.rho, "a number above 0", 0.0)
        if self.weight is not None:
            check_number("weight", self.weight, "a number >= 0", 0.0, closed="[")

    @classmethod
    def of(cls, given: Any) -> JointStart:
        """What is meant by ``align=``: one of these, or an alignment, whose teacher is balanced.

        Raises:
            ConfigError: it is neither.
        """
        from lorafa.alignment.alignment import Alignment  # brings torch's compiler

        if isinstance(given, Alignment):
            divergence = "none" if given.divergence is None else given.divergence
            term = given.term
            if term is None:
                return cls(teacher=given.teacher, divergence=divergence)
            return cls(
                teacher=given.teacher, divergence=divergence, map=term.map, map_layers=term.layers,
                map_weight=term.weight,
            )  # fmt: skip
        if not isinstance(given, cls):
            raise ConfigError(
                f"align= takes an Alignment or a JointStart(teacher=...), found {type(given).__name__!r}. Pass "
                "align=JointStart(teacher=model), for example."
            )
        return given

    @property
    def name(self) -> str:
        """The teacher's, for the record."""
        if isinstance(self.teacher, str):
            return self.teacher
        return self.teacher.name if isinstance(self.teacher, Teacher) else External.name

    def alignment(self, model: nn.Module) -> Alignment | None:
        """The discrepancy of the model as it starts; None where there is none.

        Raises:
            ConfigError, BackendError: as :class:`lorafa.alignment.Alignment`; or the teacher has layers of the model.
        """
        from lorafa.alignment.alignment import Alignment

        teacher = TEACHERS.get(self.teacher)() if isinstance(self.teacher, str) and self.teacher != External.name else (
            self.teacher
        )  # fmt: skip
        if isinstance(teacher, Teacher) and teacher.starts_as_student:
            return None
        _require_apart(teacher, model)
        return Alignment(
            model, teacher, weight=1.0, divergence=self.divergence, map=self.map, map_layers=self.map_layers,
            map_weight=self.map_weight,
        )  # fmt: skip


def _require_apart(teacher: Any, model: nn.Module) -> None:
    """Raises ConfigError for a teacher that is an adapter on the model's own layers: it is off where gradients are."""
    theirs = teacher.model if isinstance(teacher, External) else teacher
    own = {id(module) for module in model.modules()}
    if isinstance(theirs, nn.Module) and any(id(module) in own for module in theirs.modules()):
        raise ConfigError(
            "The teacher and the model share layers, so an adapter of the teacher would be off while the model's "
            "gradients are read. Load the teacher apart, or start from its weights: init_lora_weights='from_teacher'."
        )


@dataclass(frozen=True, eq=False)
class JointStatistics:
    """What a start reads, of the task's loss and of the discrepancy to a teacher, to be added up by any weight."""

    task: Statistics
    align: Statistics | None
    """None where the teacher is the model itself."""
    asked: JointStart

    def balanced(self) -> float | None:
        """The weight that balances both gradients; None where the teacher's is nothing beside the task's.

        Raises:
            CalibrationError: a gradient is not finite.
        """
        if self.align is None:
            return None
        task, align = ([_norm(one[layer]) for layer in self.task] for one in (self.task, self.align))
        return balanced_weight(task, align, rho=self.asked.rho)

    def at(self, weight: float | None = None) -> Statistics:
        """The statistics of the objective task + weight teacher, as if its gradient had been collected.

        Args:
            weight: lambda; None takes that of the :class:`JointStart`, or else the balanced one. What was used stands
                in ``about["joint"]`` of the result, with the reason where it is the task's alone.
        """
        if weight is not None:
            check_number("weight", weight, "a number >= 0", 0.0, closed="[")
        given = self.asked.weight if weight is None else weight
        found = self.balanced() if given is None else given
        joint = {"teacher": self.asked.name, "weight": found, "balanced": given is None and found is not None}
        if self.align is None:
            joint |= {"weight": None, "why": SAME.format(name=self.asked.name)}
        elif found is None:
            joint |= {"why": QUIET.format(name=self.asked.name)}
        weight = joint["weight"] if self.align is not None else None  # type: ignore[assignment]
        values = {layer: self._layer(layer, weight) for layer in self.task}
        for name in self.task.about["statistics"]:
            STATISTICS.get(name).finish(name, values)
        return Statistics(values, self.task.about | {"joint": joint})

    def _layer(self, layer: str, weight: float | None) -> dict[str, Tensor]:
        task = self.task[layer]
        own = {name: value for name, value in task.items() if f".{SUMS}" not in name}
        if self.align is None or not weight:
            return own
        align, about = self.align[layer], self.task.about
        for name in about["statistics"]:
            kind = STATISTICS.get(name)
            if not issubclass(kind, GradientSketch):
                continue
            first, second = _of(task, name), _of(align, name)
            options = CalibrationOptions(**about["options"])
            options = replace(options, keep_sums=False)
            out, in_ = len(first["U"]), first["Vh"].shape[1]
            measured = Measured(layer, out, in_, about["ranks"][layer], None, options, Projections(options.seed))
            made = kind.combined(measured, ((1.0, first), (float(weight), second)))
            own = {key: value for key, value in own.items() if not key.startswith(f"{name}.")}
            own |= {f"{name}.{key}": value for key, value in made.items()}
        return own


def _of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """||G|| of a layer, in the metric its start decomposes it in."""
    name = next(name for name in ("gradient", "whitened_gradient") if f"{name}.norm2" in tensors)
    return math.sqrt(max(float(tensors[f"{name}.norm2"]), 0.0))


def joint_statistics_of(
    resolved: Resolved,
    made: Callable[[Loss | None], Batches],
    asked: JointStart,
    *,
    options: CalibrationOptions,
    also: Iterable[str],
    progress: bool = False,
) -> JointStatistics:
    """Collect both, in one pass over the data each (and one more where inputs are read first).

    Args:
        made: the batches, run over by a loss; None is the task's.

    Raises:
        ConfigError: neither start nor rule reads a gradient, or they are to go over it several times.
        CalibrationError: the data came in another order in the second pass, and half samples are kept apart.
        DivergedError: the teacher gives inf or nan.
    """
    also = list(also)
    needs = (*resolved.start.initializer.needs, *also)
    if not any(STATISTICS.get(name).linear for name in needs):
        raise ConfigError(
            f"align= would change nothing: init_lora_weights={resolved.config.init_lora_weights!r} reads no gradient, "
            "to which that of a teacher could be added. Drop align=, or take a start that does: 'lora_one', "
            "'functional', or ranks by the gradient."
        )
    alignment = asked.alignment(resolved.model)
    options = replace(options, keep_sums=alignment is not None)
    orders: list[list[str]] = []
    with shown(_noting(made(None), orders, keep=options.halves), progress) as batches:
        task = statistics_of(resolved, batches, options=options, also=also)
    if alignment is None:
        return JointStatistics(task, None, asked)
    with shown(_noting(made(_discrepancy(alignment)), orders, keep=options.halves), progress) as batches:
        align = statistics_of(resolved, batches, options=options, also=also, beside=task)
    if any(gathered(len({tuple(order) for order in orders}) > 1)):
        raise CalibrationError(
            "The batches came in another order, or were others, for the teacher than for the task, so that the two "
            "half samples of the gradients are not kept apart: the ranks would be confirmed by the data they were "
            "found in. Pass batches that stay as they are, a DataLoader with shuffle=False or list(loader)."
        )
    return JointStatistics(task, align, asked)


def _discrepancy(alignment: Alignment) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"A teacher reads the batch too, which must be a mapping of the model's arguments with labels, found "
                f"{type(batch).__name__}. Pass batches such as {{'input_ids': ..., 'labels': ...}}."
            )
        return alignment.discrepancy(model, batch)

    return loss


def joint_loss_of(asked: JointStart, stats: Statistics, task: Loss | None = None) -> Loss | None:
    """task + weight teacher, of a model with its adapter on: what held-out rows are compared by.

    Args:
        stats: what :meth:`JointStatistics.at` has returned, which say the weight.
        task: the task's loss; None is the model's own, and so is what is returned where the teacher has no weight.
    """
    weight = stats.about["joint"]["weight"]
    if not weight:
        return task
    made: list[Loss] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not made:  # finding out how a model is called takes a trial
            alignment = asked.alignment(model)
            assert alignment is not None  # there is a weight
            made.extend([task or default_loss(model), _discrepancy(alignment)])
        own, theirs = made[0](model, batch), made[1](model, batch)
        return own + float(weight) * theirs

    return loss


def _noting(batches: Batches, orders: list[list[str]], *, keep: bool) -> Batches:
    """The batches, with the order they came in the last time they were gone over for gradients."""
    if not keep:
        return batches

    def run(asked: Asked) -> Iterator[float | None]:
        order: list[str] = []

        def note(batch: Any) -> None:
            order.append(digest_of(list(contents(batch))))
            asked.note(batch)

        if asked.gradients:
            orders.append(order)
        yield from batches.run(replace(asked, note=note))

    return replace(batches, run=run)
