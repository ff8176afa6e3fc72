"""The courses a learning rate can take, by transformers' names, each with the settings it has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafa.errors import ConfigError
from lorafa.registry import Registry
from lorafa.settings.checks import check_int, check_number

_HERE = "lorafa.train.settings.schedules"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A line of ``SCHEDULES``."""

    settings: type[Any] | None = None
    """A frozen dataclass of its own settings, by the names transformers has for them; each is ``optim.<name>``."""
    kind: str | None = None
    """transformers' name, where it is another one."""
    warms: bool = True
    """Whether it begins with a rise over ``optim.warmup``."""
    measured: bool = False
    """Whether it goes by the held-out loss."""
    ends: bool = True
    """Whether the rate of a step depends on how many there are in all."""


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {
        "constant": f"{_HERE}:CONSTANT",
        "constant_with_warmup": f"{_HERE}:CONSTANT",
        "linear": f"{_HERE}:LINEAR",
        "cosine": f"{_HERE}:COSINE",
        "cosine_with_restarts": f"{_HERE}:RESTARTS",
        "cosine_with_min_lr": f"{_HERE}:COSINE_TO_FLOOR",
        "cosine_warmup_with_min_lr": f"{_HERE}:COSINE_FROM_FLOOR",
        "polynomial": f"{_HERE}:POLYNOMIAL",
        "inverse_sqrt": f"{_HERE}:INVERSE_SQRT",
        "warmup_stable_decay": f"{_HERE}:STABLE_DECAY",
        "reduce_lr_on_plateau": f"{_HERE}:PLATEAU",
        "greedy": f"{_HERE}:GREEDY",
    },
)


@dataclass(frozen=True, kw_only=True)
class CosineSettings:
    """How far the cosine goes."""

    num_cycles: float = 0.5
    """Waves of the cosine: 0.5 falls to the lowest rate once."""

    def __post_init__(self) -> None:
        check_number("num_cycles", self.num_cycles, "a number > 0", 0)


@dataclass(frozen=True, kw_only=True)
class RestartSettings:
    """How often the rate starts again."""

    num_cycles: int = 1
    """Times the rate falls to 0; it is back at optim.lr in between."""

    def __post_init__(self) -> None:
        check_int("num_cycles", self.num_cycles, at_least=1)


@dataclass(frozen=True, kw_only=True)
class FloorSettings(CosineSettings):
    """Where the cosine ends."""

    min_lr: float | None = None
    """Lowest rate; null goes by min_lr_rate."""
    min_lr_rate: float | None = None
    """Lowest rate as a share of optim.lr; where min_lr is null too it is 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr is not None and self.min_lr_rate is not None:
            raise ConfigError(
                f"min_lr={self.min_lr:g} and min_lr_rate={self.min_lr_rate:g} say the same thing twice. Drop one of "
                "the two."
            )
        if self.min_lr is not None:
            check_number("min_lr", self.min_lr, "a number >= 0", 0, closed="[")
        if self.min_lr_rate is not None:
            check_number("min_lr_rate", self.min_lr_rate, "a number in [0, 1]", 0, 1, closed="[]")


@dataclass(frozen=True, kw_only=True)
class TwoFloorsSettings(FloorSettings):
    """Where the rise begins as well."""

    warmup_lr_rate: float | None = None
    """Rate of the first step as a share of optim.lr; null divides optim.lr by the steps of the warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_lr_rate is not None:
            check_number("warmup_lr_rate", self.warmup_lr_rate, "a number in (0, 1]", 0, 1, closed="]")


@dataclass(frozen=True, kw_only=True)
class PolynomialSettings:
    """How the rate falls, and where to."""

    lr_end: float = 1e-7
    """Rate at the end, below optim.lr."""
    power: float = 1.0
    """Power of the share of steps that is left."""

    def __post_init__(self) -> None:
        check_number("lr_end", self.lr_end, "a number >= 0", 0, closed="[")
        check_number("power", self.power, "a number > 0", 0)


@dataclass(frozen=True, kw_only=True)
class InverseSqrtSettings:
    """How fast the rate falls."""

    timescale: int | None = None
    """Steps after which it has fallen by the root of 2; null takes the steps of the warm-up, or 10000 without."""

    def __post_init__(self) -> None:
        if self.timescale is not None:
            check_int("timescale", self.timescale, at_least=1)


@dataclass(frozen=True, kw_only=True)
class StableDecaySettings(CosineSettings):
    """The rise and the fall around the steps at optim.lr."""

    num_decay_steps: float = 0.1
    """Steps of the fall at the end: steps if >= 1, a share of all steps below 1."""
    warmup_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Form of the rise."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    """Form of the fall; num_cycles is of the cosine."""
    min_lr_ratio: float = 0.0
    """Lowest rate as a share of optim.lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("num_decay_steps", self.num_decay_steps, "a number > 0", 0)
        check_number("min_lr_ratio", self.min_lr_ratio, "a number in [0, 1]", 0, 1, closed="[]")


@dataclass(frozen=True, kw_only=True)
class PlateauSettings:
    """When the rate falls, and by how much."""

    factor: float = 0.1
    """What the rate is multiplied by."""
    patience: int = 10
    """Measurements of the held-out loss without improvement before that."""
    threshold: float = 1e-4
    """Smallest improvement that counts."""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """Whether threshold is a share of the lowest loss, or nats."""
    cooldown: int = 0
    """Measurements after a fall that do not count."""
    min_lr: float = 0.0
    """Lowest rate."""

    def __post_init__(self) -> None:
        check_number("factor", self.factor, "a number in (0, 1)", 0, 1)
        check_number("threshold", self.threshold, "a number >= 0", 0, closed="[")
        check_number("min_lr", self.min_lr, "a number >= 0", 0, closed="[")
        check_int("patience", self.patience, at_least=0)
        check_int("cooldown", self.cooldown, at_least=0)


@dataclass(frozen=True, kw_only=True)
class GreedySettings(PlateauSettings):
    """When the rate falls or rises, and by how much (GreedyLR, arXiv:2512.14527)."""

    factor: float = 0.95
    """What the rate is multiplied by where the loss does not improve, and divided by where it does."""
    threshold: float = 1e-6
    """Smallest improvement that counts."""
    threshold_mode: Literal["rel", "abs"] = "abs"
    """Whether threshold is a share of the lowest loss, or nats."""
    max_lr: float | None = None
    """Highest rate; null is ten times optim.lr."""
    smooth: bool = False
    """Go by a running mean of the held-out loss."""
    window_size: int = 50
    """Measurements of that mean."""
    reset_start: int = 500
    """Measurements at the lowest rate before it starts again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_lr is not None:
            check_number("max_lr", self.max_lr, "a number > 0", 0)
        check_int("window_size", self.window_size, at_least=1)
        check_int("reset_start", self.reset_start, at_least=0)


CONSTANT = Schedule(kind="constant_with_warmup", ends=False)
LINEAR = Schedule()
COSINE = Schedule(settings=CosineSettings)
RESTARTS = Schedule(settings=RestartSettings)
COSINE_TO_FLOOR = Schedule(settings=FloorSettings)
COSINE_FROM_FLOOR = Schedule(settings=TwoFloorsSettings)
POLYNOMIAL = Schedule(settings=PolynomialSettings)
INVERSE_SQRT = Schedule(settings=InverseSqrtSettings, ends=False)
STABLE_DECAY = Schedule(settings=StableDecaySettings)
PLATEAU = Schedule(settings=PlateauSettings, warms=False, measured=True, ends=False)
GREEDY = Schedule(settings=GreedySettings, warms=False, measured=True, ends=False)


def schedule_arguments(own: Any, lr: float) -> Mapping[str, Any]:
    """The own settings of a schedule as transformers takes them; those that are null are left to it."""
    given = {} if own is None else {name: value for name, value in asdict(own).items() if value is not None}
    if isinstance(own, FloorSettings) and not {"min_lr", "min_lr_rate"} & given.keys():
        given["min_lr_rate"] = 0.1
    if isinstance(own, GreedySettings):
        given.setdefault("max_lr", 10 * lr)
    return given
