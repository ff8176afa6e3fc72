"""When the teacher counts: all the time, or in phases that take turns with the task's own, each switch by a gate.

A cycle is a phase of the task alone and a phase of task and teacher (CGTR, arXiv:2606.03532, and section 2.4 of the
project's sheet on the dual objective). What stabilizes is isolation: the teacher stays as it is between refreshes, and
a refresh, like every switch of phases, is taken back where the task has become worse by it.

Nothing here touches a model: a schedule is told of each step, asks for measurements, and says what is to be done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from lorafa.errors import CheckpointError
from lorafa.settings.checks import check_choice, check_flag, check_int, check_number

Phase = Literal["task", "teacher"]
SCHEDULES = ("constant", "cyclic")
TRIGGERS = ("clock", "drift")


@dataclass(frozen=True)
class Probe:
    """What the student is on the fixed rows of the probe."""

    task: float
    """Loss of the task in nats a token."""
    divergence: float
    """Discrepancy to the teacher, without its weight."""


@dataclass(frozen=True)
class Decision:
    """Something a schedule has decided, for the record."""

    step: int
    """Optimizer steps that are done."""
    kind: str
    """"switch", "refused", "rolled back", "reweighted", "ended"; "balanced" where the weight was read of gradients,
    "reoriented" and "compressed" where a phase has begun in new directions and ended, "cached" of a teacher that was
    kept."""
    phase: Phase
    """The phase that holds from here on."""
    why: str
    probe: Probe | None = None
    refresh: bool = False
    """Let the teacher follow the student."""
    accept: bool = False
    """Keep the student as it is, to come back to."""
    roll_back: bool = False
    """Bring the student back to what was last kept."""
    begins: bool = False
    """A phase of the teacher begins."""
    discarded: float = 0.0
    """Share of the squared norm of the student's update that a teacher that was refreshed, or that follows each step,
    or the student's own rank after a reoriented phase, could not hold."""


@dataclass(frozen=True)
class Share:
    """What counts in the next step."""

    task: float
    teacher: float
    rate: float
    """Factor on the learning rate."""


@dataclass(frozen=True)
class CyclicSettings:
    """Settings of the phases."""

    task_steps: int = 200
    """Steps of the task alone, K_s."""
    teacher_steps: int = 50
    """Steps of task and teacher, K_t."""
    task_weight: float = 0.5
    """What the task counts beside the teacher, mu."""
    trigger: str = "clock"
    """What proposes a phase of the teacher: "clock" after ``task_steps``, "drift" also as soon as the divergence has
    grown by ``drift``, which is looked at after each quarter of ``task_steps``."""
    gate: bool = True
    """Whether a proposal is taken back where the task's loss on the probe is worse than ``tolerance`` allows."""
    tolerance: float = 0.01
    """By how much, as a share, the task's loss may be above that of the last state that was accepted."""
    drift: float = 0.2
    """By how much, as a share, the divergence may be above its least value since the teacher counted last, or became
    another one."""
    rewarm_steps: int = 10
    """After a switch the rate rises from 0.3 of itself over so many steps."""
    most_rollbacks: int = 3
    """After so many the cycles end, and the task alone is trained on."""
    end_on_teacher: bool = False
    """Let the teacher have the last ``teacher_steps``, for which the task's phase before them may be longer; otherwise
    the task has the last steps."""
    reorient: bool = False
    """Begin each phase of the teacher with new A along the gradient of the joint loss, and B = 0, beside the update so
    far, which is frozen; at its end both are cut to the rank together."""

    def __post_init__(self) -> None:
        for name in ("task_steps", "teacher_steps", "rewarm_steps", "most_rollbacks"):
            check_int(f"align.{name}", getattr(self, name), at_least=0 if name == "rewarm_steps" else 1)
        check_number("align.task_weight", self.task_weight, "a number >= 0", 0.0, closed="[")
        check_number("align.tolerance", self.tolerance, "a number >= 0", 0.0, closed="[")
        check_number("align.drift", self.drift, "a number above 0", 0.0)
        check_choice("align.trigger", self.trigger, TRIGGERS)
        check_flag("align.gate", self.gate)
        check_flag("align.end_on_teacher", self.end_on_teacher)
        check_flag("align.reorient", self.reorient)


class Schedule(ABC):
    """Says what counts in each step."""

    probes: ClassVar[bool] = False
    """Whether it measures the student on a probe."""

    @abstractmethod
    def share(self) -> Share:
        """What counts in the next step."""

    def begin(self, weight: float, probe: Callable[[], Probe]) -> None:
        """Start with this weight of the teacher."""
        return None

    def after_step(self, probe: Callable[[], Probe]) -> list[Decision]:
        """Take in that a step was done; ``probe`` measures the student as it is now."""
        return []

    @abstractmethod
    def reweigh(self, weight: float) -> None:
        """Go on with another weight of the teacher, as if it had been the first."""

    def followed(self) -> None:
        """Take in that the teacher is another one from here on: what was measured of the last says nothing of it."""
        return None

    @property
    def steps(self) -> int | None:
        """The steps of the whole training that it was told of; None where it needs to know of none."""
        return None

    @property
    def finished(self) -> bool:
        """Whether no step is left that it knows of."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a training to go on, in json's types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept.

        Raises:
            CheckpointError: it is of another schedule.
        """
        if state:
            raise CheckpointError(
                "The checkpoint's teacher came in phases, and here it counts in every step. Set align.schedule as it "
                "was."
            )


class Constant(Schedule):
    """The teacher counts in every step."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def share(self) -> Share:
        return Share(1.0, self.weight, 1.0)

    def reweigh(self, weight: float) -> None:
        self.weight = weight


@dataclass(frozen=True)
class CyclicState:
    """Where a cyclic schedule is."""

    step: int = 0
    phase: Phase = "task"
    in_phase: int = 0
    weight: float = 0.0
    """The teacher's, which is adapted."""
    first_weight: float = 0.0
    accepted: float = float("inf")
    """The task's loss on the probe when the student was last accepted."""
    least: float = float("inf")
    """The least divergence from the present teacher since it counted last."""
    before: float | None = None
    """The divergence with which the phase of the teacher began."""
    before_task: float | None = None
    refusals: int = 0
    """In a row."""
    rollbacks: int = 0
    rate: float = 1.0
    """What the rate rises to again: half of it after a roll-back."""
    ended: bool = False


@dataclass
class Cyclic(Schedule):
    """Phases of the task and of the teacher in turn.

    At the end of each phase a probe decides. Where the gate is on, the next phase (and at the end of a teacher's phase
    the refresh of the teacher) comes only if the task's loss on the probe is at most 1 % above that of the last state
    that was accepted; else the phase goes on for as long again and the refusal is recorded. Two refusals in a row
    bring the last accepted state back, with half the rate. At the end of a teacher's phase its weight is adapted: by
    1.5 if the divergence fell by less than 5 % in it, by 0.7 if the task's loss rose by more than 10 %, within an
    eighth and eight times of what it was at first. The last phase is the task's, as long as the teacher's before it or
    longer; with ``end_on_teacher`` it is the teacher's.
    """

    probes = True
    settings: CyclicSettings
    total: int
    """Optimizer steps of the whole training."""
    state: CyclicState = field(default_factory=CyclicState)

    def begin(self, weight: float, probe: Callable[[], Probe]) -> None:
        found = probe()
        self.state = CyclicState(weight=weight, first_weight=weight, accepted=found.task)

    def reweigh(self, weight: float) -> None:
        self.state = replace(self.state, weight=weight, first_weight=weight)

    def followed(self) -> None:
        self.state = replace(self.state, least=float("inf"))

    @property
    def steps(self) -> int | None:
        return self.total

    @property
    def finished(self) -> bool:
        return self.state.step >= self.total

    def share(self) -> Share:
        own, rewarm = self.state, self.settings.rewarm_steps
        switched = own.in_phase < own.step  # the first phase has begun by no switch
        risen = min(own.in_phase / rewarm, 1.0) if rewarm and switched else 1.0
        rate = own.rate * (0.3 + 0.7 * risen)
        if own.phase == "task" or own.ended:
            return Share(1.0, 0.0, rate)
        return Share(self.settings.task_weight, own.weight, rate)

    def after_step(self, probe: Callable[[], Probe]) -> list[Decision]:
        own = self.state = replace(self.state, step=self.state.step + 1, in_phase=self.state.in_phase + 1)
        if own.ended or own.step >= self.total:
            return []
        settings, left = self.settings, self.total - own.step
        length = settings.task_steps if own.phase == "task" else settings.teacher_steps
        if settings.end_on_teacher and own.phase == "task" and left < length + 2 * settings.teacher_steps:
            if left > settings.teacher_steps:
                return []  # no other cycle fits in: the last phase of the teacher is to end with the training
            if left == settings.teacher_steps:
                return self._propose(probe(), f"{left} steps are left")
        if own.in_phase % length == 0:
            return self._propose(probe(), f"{own.in_phase} steps of the phase are done")
        quarter = -(-settings.task_steps // 4)
        if settings.trigger == "drift" and own.phase == "task" and own.in_phase % quarter == 0:
            found = probe()
            if found.divergence > (1 + settings.drift) * own.least:
                return self._propose(found, f"the divergence {found.divergence:.4g} has left {own.least:.4g}")
            self.state = replace(own, least=min(own.least, found.divergence))
        return []

    def _propose(self, found: Probe, why: str) -> list[Decision]:
        own, settings = self.state, self.settings
        worse = found.task > (1 + settings.tolerance) * own.accepted
        if settings.gate and (worse or found.task != found.task):
            return self._refused(found, why)
        decisions = self._reweighted(found) if own.phase == "teacher" else []
        following: Phase = "teacher" if own.phase == "task" else "task"
        no_room = self.total - own.step < settings.teacher_steps * (1 if settings.end_on_teacher else 2)
        if following == "teacher" and no_room:
            self.state = replace(self.state, ended=True)
            return [*decisions, Decision(own.step, "ended", "task", "the steps left are the task's", found)]
        self.state = replace(
            self.state, phase=following, in_phase=0, refusals=0, accepted=found.task, least=found.divergence,
            before=found.divergence if following == "teacher" else None,
            before_task=found.task if following == "teacher" else None, rate=1.0,
        )  # fmt: skip
        begins = following == "teacher"
        done = Decision(own.step, "switch", following, why, found, refresh=not begins, accept=True, begins=begins)
        return [*decisions, done]

    def _refused(self, found: Probe, why: str) -> list[Decision]:
        own = self.state
        reason = (
            f"{why}, and the task's loss {found.task:.4g} on the probe is more than {self.settings.tolerance:.0%} "
            f"above {own.accepted:.4g}"
        )
        if own.refusals == 0:
            self.state = replace(own, refusals=1)
            return [Decision(own.step, "refused", own.phase, reason, found)]
        rollbacks = own.rollbacks + 1
        ended = rollbacks >= self.settings.most_rollbacks
        self.state = replace(
            own, refusals=0, rollbacks=rollbacks, rate=0.5, phase="task", in_phase=0, ended=ended, before=None,
            before_task=None,
        )  # fmt: skip
        decisions = [Decision(own.step, "rolled back", "task", reason, found, roll_back=True)]
        if ended:
            why = f"{rollbacks} roll-backs: the gate lets no phase through, so the task alone is trained on"
            decisions.append(Decision(own.step, "ended", "task", why, found))
        return decisions

    def _reweighted(self, found: Probe) -> list[Decision]:
        own, factor, why = self.state, 1.0, ""
        if own.before is not None and found.divergence > 0.95 * own.before:
            factor, why = 1.5, f"the divergence fell from {own.before:.4g} to {found.divergence:.4g} only"
        if own.before_task is not None and found.task > 1.1 * own.before_task:
            factor, why = 0.7, f"the task's loss rose from {own.before_task:.4g} to {found.task:.4g}"
        weight = min(max(own.weight * factor, own.first_weight / 8), 8 * own.first_weight)
        if weight == own.weight:
            return []
        self.state = replace(own, weight=weight)
        return [Decision(own.step, "reweighted", own.phase, f"{why}: weight {own.weight:.4g} -> {weight:.4g}", found)]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(CyclicState.__dataclass_fields__):
            raise CheckpointError(
                "The checkpoint's cyclic schedule is of another version: it has other numbers."
                if state
                else "The checkpoint's teacher counted in every step, and here it comes in phases. Set align.schedule "
                "as it was."
            )
        self.state = CyclicState(**state)
