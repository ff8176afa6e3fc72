"""The teacher of a run: who it is, how far from it counts how much, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS
from lorafa.errors import ConfigError
from lorafa.models import QUANTIZERS
from lorafa.registry import Registry
from lorafa.settings.checks import check_choice, check_flag, check_int, check_number
from lorafa.settings.groups import OpenGroup
from lorafa.settings.typed import Key

NONE, EXTERNAL = "none", "external"
CYCLIC_FIELDS = (
    *("task_steps", "teacher_steps", "task_weight", "trigger", "gate", "tolerance", "drift", "rewarm_steps"),
    *("end_on_teacher", "probe_rows"),
)
"""Settings that only phases in turn have."""


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
    weight: float = 0.5
    """What the discrepancy counts beside the task's loss; 0 is a plain training."""
    divergence: str | None = None
    """How far the distributions over next tokens are apart: one of those that follow, or none to compare inner states
    alone; null is masked_target for base, and fkl for the others."""
    map: str | None = None
    """How far inner states are apart, beside that: mse, cos, procrustes, gram, lens, functional, cka; null for none."""
    map_layers: list[int] | None = None
    """After which layers; null is half of them and the last."""
    map_weight: float = 0.1
    """What that counts beside the divergence."""
    schedule: str = "constant"
    """constant: the teacher counts in every step. cyclic: phases of the task alone and of task and teacher in turn."""
    task_steps: int = 200
    """cyclic: steps of a phase of the task alone."""
    teacher_steps: int = 50
    """cyclic: steps of a phase of the teacher."""
    task_weight: float = 0.5
    """cyclic: what the task counts in a phase of the teacher."""
    trigger: str = "clock"
    """cyclic: what begins a phase of the teacher: clock, or drift as well, a divergence that has grown."""
    gate: bool = True
    """cyclic: take a switch back where the task's loss has become worse on the probe."""
    tolerance: float = 0.01
    """cyclic: by how much, as a share, it may."""
    drift: float = 0.2
    """cyclic: by how much, as a share, the divergence may grow before drift begins a phase of the teacher."""
    rewarm_steps: int = 10
    """cyclic: steps in which the rate rises again after a switch."""
    end_on_teacher: bool = False
    """cyclic: give the teacher the last steps, which are the task's otherwise."""
    probe_rows: int = 32
    """cyclic: rows of the probe, the first of the held-out ones."""
    own: Any = None
    """The teacher's own settings."""
    own_of_divergence: Any = None
    """Those of the divergence."""

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
        check_number("align.weight", self.weight, "a number >= 0", 0.0, closed="[")
        check_number("align.map_weight", self.map_weight, "a number >= 0", 0.0, closed="[")
        if self.map is not None:
            check_choice("align.map", self.map, MAPS.names())
        if self.quantize is not None:
            check_choice("align.quantize", self.quantize, QUANTIZERS.names())
        check_choice("align.schedule", self.schedule, ("constant", "cyclic"))
        check_choice("align.trigger", self.trigger, ("clock", "drift"))
        for name in ("task_steps", "teacher_steps", "probe_rows"):
            check_int(f"align.{name}", getattr(self, name), at_least=1)
        check_int("align.rewarm_steps", self.rewarm_steps, at_least=0)
        for name in ("task_weight", "tolerance"):
            check_number(f"align.{name}", getattr(self, name), "a number >= 0", 0.0, closed="[")
        check_number("align.drift", self.drift, "a number above 0", 0.0)
        for name in ("gate", "end_on_teacher"):
            check_flag(f"align.{name}", getattr(self, name))
        self._refuse_ignored()

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher that counts."""
        return self.name != NONE and self.weight > 0

    def _refuse_ignored(self) -> None:
        """Raises ConfigError for what was set and would change nothing, and for a teacher that is not named."""
        changed = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in ("name", "own", "own_of_divergence") and getattr(self, one.name) != one.default
        }
        if self.name == NONE and changed:
            name, value = next(iter(changed.items()))
            raise ConfigError(f"align.{name}={value} would change nothing: there is no teacher. Add align=base, say.")
        if (self.name == EXTERNAL) != (self.teacher is not None):
            raise ConfigError(
                "align=external needs align.teacher=<model>, which no other teacher reads. Give both, or neither."
            )
        ignored = [name for name in CYCLIC_FIELDS if name in changed and self.schedule == "constant"]
        ignored += [name for name in ("map_layers", "map_weight") if name in changed and self.map is None]
        ignored += [name for name in ("dtype", "quantize") if name in changed and self.name != EXTERNAL]
        ignored += ["drift"] if "drift" in changed and self.trigger != "drift" else []
        ignored += ["tolerance"] if "tolerance" in changed and not self.gate else []
        if ignored:
            raise ConfigError(f"align.{ignored[0]}={changed[ignored[0]]} would change nothing here. Drop it.")
        if self.divergence == NONE and self.map is None:
            raise ConfigError("align.divergence=none compares inner states alone, and align.map is null. Name one.")
