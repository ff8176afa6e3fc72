"""The teacher of a run: who it is, how far from it counts how much, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS
from lorafa.alignment.schedule import SCHEDULES, CyclicSettings
from lorafa.alignment.weighing import check_weight
from lorafa.errors import ConfigError
from lorafa.models import QUANTIZERS
from lorafa.registry import Registry
from lorafa.settings.checks import check_choice, check_flag, check_int, check_number, indices
from lorafa.settings.groups import OpenGroup
from lorafa.settings.typed import Key

NONE, EXTERNAL, BASE = "none", "external", "base"
_PHASES = (
    *("task_steps", "teacher_steps", "task_weight", "trigger", "gate", "tolerance", "drift", "rewarm_steps"),
    *("end_on_teacher", "reorient"),
)
"""Settings of a cyclic schedule itself, with the names, the defaults and the checks that it has for them."""
CYCLIC_FIELDS = (*_PHASES, "probe_rows")
"""Settings that only phases in turn have."""
TRUST = "trust_remote_code"
_OPEN = ("name", "own", "own_of_divergence")
_OF_EXTERNAL = ("dtype", "quantize", TRUST)
"""Settings of how another model is loaded."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig(OpenGroup):
    """The teacher, and what the discrepancy to it counts beside the task."""

    group: ClassVar[str] = "align"
    opens: ClassVar[Mapping[str, str]] = {"name": "own", "divergence": "own_of_divergence"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"name": TEACHERS, "divergence": DIVERGENCES}

    name: str = NONE
    """The teacher: base (the model without adapters, against forgetting), snapshot (the student at the last refresh),
    ema (an average of it), anchor (halfway to where it began), external (another model); none for a plain training."""
    teacher: str | None = None
    """The other model of external: one known by name, a folder, or a Hub id. It needs the student's vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """external: number format of its weights; auto keeps the stored one."""
    quantize: str | None = None
    """external: quantize its linear layers when it is loaded, as model.quantize does the base's; null quantizes
    nothing."""
    trust_remote_code: bool = False
    """external: run code that comes with the teacher, as model.trust_remote_code does the model's."""
    weight: float | str = 0.5
    """What the discrepancy counts beside the task's loss; 0 is a plain training. balanced reads it once of the sizes of
    both gradients, and is 0.5 as long as the teacher has none."""
    divergence: str | None = None
    """How far the distributions over next tokens are apart: one of those that follow, or none to compare inner states
    alone; null is masked_target for base, and fkl for the others."""
    map: str | None = None
    """How far inner states are apart, beside that: mse, cos, procrustes, gram, lens, functional, cka, proj
    (after a linear map that is trained, and dropped at the end); null for none."""
    map_layers: list[int] | None = None
    """After which layers; null is half of them and the last."""
    map_weight: float = 0.1
    """What that counts beside the divergence."""
    schedule: str = "constant"
    """constant: the teacher counts in every step. cyclic: phases of the task alone and of task and teacher in turn."""
    task_steps: int = CyclicSettings.task_steps
    """cyclic: steps of a phase of the task alone."""
    teacher_steps: int = CyclicSettings.teacher_steps
    """cyclic: steps of a phase of the teacher."""
    task_weight: float = CyclicSettings.task_weight
    """cyclic: what the task counts in a phase of the teacher."""
    trigger: str = CyclicSettings.trigger
    """cyclic: what begins a phase of the teacher: clock, or drift as well, a divergence that has grown."""
    gate: bool = CyclicSettings.gate
    """cyclic: take a switch back where the task's loss has become worse on the probe."""
    tolerance: float = CyclicSettings.tolerance
    """cyclic: by how much, as a share, it may."""
    drift: float = CyclicSettings.drift
    """cyclic: by how much, as a share, the divergence may grow before drift begins a phase of the teacher."""
    rewarm_steps: int = CyclicSettings.rewarm_steps
    """cyclic: steps in which the rate rises again after a switch."""
    end_on_teacher: bool = CyclicSettings.end_on_teacher
    """cyclic: give the teacher the last teacher_steps, which are the task's otherwise."""
    probe_rows: int = 32
    """cyclic: rows of the probe, the first of the held-out ones."""
    start: bool = True
    """Let an init= that reads gradients read that of task and teacher together, where the teacher is another function
    than the model as it starts (external); false leaves the start to the task."""
    start_weight: float | None = None
    """What the teacher counts in that start; null makes its gradient half as large as the task's."""
    reorient: bool = CyclicSettings.reorient
    """cyclic: give A new directions along the gradient of the joint loss where a phase of the teacher begins; the
    update so far is frozen beside it, and both are cut to the rank at the end."""
    cache: bool | str = False
    """Ask the teacher (base or external) of each row once, before the training, and keep what it says: in the folder
    named, or with true in one of the user's cache. A training that finds all there does not load the teacher."""
    top_k: int = 64
    """cache: likeliest tokens that are kept at each position, the others as one."""
    own: Any = None
    """The teacher's own settings."""
    own_of_divergence: Any = None
    """The divergence's own settings."""

    @classmethod
    def entries(cls, field: str) -> list[str]:
        more = (NONE, EXTERNAL) if field == "name" else (NONE,)
        return sorted({*super().entries(field), *more})

    @classmethod
    def settings_of(cls, field: str, chosen: Any) -> type[Any] | None:
        if chosen is None and field == "divergence":
            return None
        check_choice(f"align.{field}", chosen, cls.entries(field))
        return None if chosen in (NONE, EXTERNAL) else super().settings_of(field, chosen)

    @classmethod
    def own_keys(cls, field: str) -> dict[str, list[Key]]:
        plain: dict[str, list[Key]] = {cls.words(field, name): [] for name in cls.entries(field)}
        return plain | super().own_keys(field)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("align.weight", self.weight)
        check_number("align.map_weight", self.map_weight, "a number >= 0", 0.0, closed="[")
        if self.map is not None:
            check_choice("align.map", self.map, MAPS.names())
        if self.map_layers is not None and not indices("align.map_layers", self.map_layers):
            raise ConfigError("align.map_layers names no layer. Name some, align.map_layers=[1,2], or leave it out.")
        if self.quantize is not None:
            check_choice("align.quantize", self.quantize, QUANTIZERS.names())
        check_choice("align.schedule", self.schedule, SCHEDULES)
        self.phases()
        check_int("align.probe_rows", self.probe_rows, at_least=1)
        if self.start_weight is not None:
            check_number("align.start_weight", self.start_weight, "a number >= 0", 0.0, closed="[")
        check_int("align.top_k", self.top_k, at_least=1)
        check_flag("align.start", self.start)
        check_flag("align.trust_remote_code", self.trust_remote_code)
        self._refuse_ignored()

    def phases(self) -> CyclicSettings:
        """The settings of a cyclic schedule.

        Raises:
            ConfigError: one of them is not allowed.
        """
        return CyclicSettings(**{name: getattr(self, name) for name in _PHASES})

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher that counts."""
        return self.name != NONE and self.weight != 0

    def _refuse_ignored(self) -> None:
        """Raises ConfigError for what was set and would change nothing, and for a teacher that is not named."""
        changed = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in _OPEN and getattr(self, one.name) != one.default
        }
        if self.name == NONE and changed.keys() - {TRUST}:  # which a run that goes on may be given alone
            name, value = next((name, value) for name, value in changed.items() if name != TRUST)
            raise ConfigError(f"align.{name}={value} would change nothing: there is no teacher. Add align=base, say.")
        if (self.name == EXTERNAL) != (self.teacher is not None):
            raise ConfigError(
                "align=external needs align.teacher=<model>, which no other teacher reads. Give both, or neither."
            )
        ignored = [name for name in CYCLIC_FIELDS if name in changed and self.schedule == "constant"]
        ignored += [name for name in ("map_layers", "map_weight") if name in changed and self.map is None]
        ignored += ["start_weight"] if "start_weight" in changed and not (self.start and self.teaches) else []
        ignored += ["top_k"] if "top_k" in changed and not self.cache else []
        ignored += [name for name in _OF_EXTERNAL if name in changed and self.name not in (EXTERNAL, NONE)]
        ignored += ["drift"] if "drift" in changed and self.trigger != "drift" else []
        ignored += ["tolerance"] if "tolerance" in changed and not self.gate else []
        if ignored:
            raise ConfigError(f"align.{ignored[0]}={changed[ignored[0]]} would change nothing here. Drop it.")
        if self.cache and self.name not in (BASE, EXTERNAL, NONE):
            raise ConfigError(
                f"align.cache keeps what a teacher says once and for all, and align={self.name} changes while the "
                "student is trained. Take base or external, or leave it out."
            )
        if self.cache and self.map is not None:
            raise ConfigError("align.cache keeps distributions, and align.map compares inner states. Drop one of them.")
        if self.divergence == NONE and self.map is None:
            raise ConfigError("align.divergence=none compares inner states alone, and align.map is null. Name one.")
