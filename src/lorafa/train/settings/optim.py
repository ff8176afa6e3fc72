"""The optimizer of a run and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lorafa.errors import ConfigError
from lorafa.optimizers import OPTIMIZERS
from lorafa.registry import Registry
from lorafa.settings.checks import check_number, check_rate
from lorafa.settings.declared import declared
from lorafa.settings.groups import OpenGroup
from lorafa.settings.typed import Key
from lorafa.train.settings.schedules import SCHEDULES, PolynomialSettings, schedule_arguments

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lorafa.optimizers.entry import OptimizerEntry


def usual_warmup(schedule: str) -> float:
    """The warm-up of a schedule where none is given: a share of the training."""
    return 0.05 if SCHEDULES.get(schedule).warms else 0.0


@dataclass(frozen=True, kw_only=True)
class OptimConfig(OpenGroup):
    """The optimizer and its schedule."""

    group: ClassVar[str] = "optim"
    opens: ClassVar[Mapping[str, str]] = {"name": "own", "schedule": "own_of_schedule"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"name": OPTIMIZERS, "schedule": SCHEDULES}

    name: str = "adamw"
    """Optimizer."""
    lr: float | None = None
    """Highest learning rate; null takes the optimizer's own, which stands below, and auto what `lorafa plan` recommends
    for the model, the start, the optimizer and the length of the training."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the trained parameters."""
    warmup: float | None = None
    """Rise of the learning rate: steps if >= 1, a share of all steps below 1, rounded up; the last of them is the first
    with the whole rate. null is 0.05, and 0 for a schedule without a rise."""
    shorten_warmup: bool = False
    """End a warm-up that is as long as the training or longer one step before the training, in place of an error."""
    schedule: str = "linear"
    """Course of the learning rate, by its name in transformers; constant and constant_with_warmup are the same here."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0 leaves them alone."""
    own: Any = None
    """The optimizer's own settings."""
    own_of_schedule: Any = None
    """The schedule's own settings."""

    @classmethod
    def own_keys(cls, field: str) -> dict[str, list[Key]]:
        """With the rate that goes with the optimizer."""
        if field != "name":
            return super().own_keys(field)
        rates = {cls.words(field, name): declared(OPTIMIZERS, name).keywords["lr"] for name in OPTIMIZERS.names()}
        doc = "Its own rate, where none is given."
        own = super().own_keys(field)
        return {words: [Key("lr", float, rates[words], doc), *keys] for words, keys in own.items()}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_lr()
        check_rate("optim.lr", self.lr)
        if self.lr == 0:
            raise ConfigError("optim.lr is 0, so nothing would be learned. Give a number > 0, such as optim.lr=1e-3.")
        check_number("optim.weight_decay", self.weight_decay, "a number >= 0", 0, closed="[")
        self._settle_warmup()
        if isinstance(self.own_of_schedule, PolynomialSettings) and self.own_of_schedule.lr_end >= self.rate:
            raise ConfigError(
                f"optim.lr_end={self.own_of_schedule.lr_end:g} is not below optim.lr={self.rate:g}, so the rate would "
                "not fall. Give a smaller one, or optim.schedule=constant."
            )
        check_number("optim.max_grad_norm", self.max_grad_norm, "a number >= 0", 0, closed="[")

    def _settle_lr(self) -> None:
        """Write the optimizer's own rate down where none is given: the record of a run says which it was."""
        if self.lr is None:
            object.__setattr__(self, "lr", entry_of(self).lr)

    def _settle_warmup(self) -> None:
        warms = SCHEDULES.get(self.schedule).warms
        if self.warmup is None:
            object.__setattr__(self, "warmup", usual_warmup(self.schedule))
        check_number("optim.warmup", self.warmup, "a number >= 0", 0, closed="[")
        if self.warmup and not warms:
            raise ConfigError(
                f"optim.warmup={self.warmup:g} would change nothing: optim.schedule={self.schedule} begins at "
                "optim.lr. Drop it."
            )

    @property
    def rate(self) -> float:
        """The highest rate, which is settled."""
        assert self.lr is not None
        return self.lr


def entry_of(optim: OptimConfig) -> OptimizerEntry:
    """The line of the table that the settings name."""
    return OPTIMIZERS.get(optim.name)


def words(optim: OptimConfig) -> str:
    """What is written after ``optim=`` to have this optimizer, its form included."""
    form = entry_of(optim).form
    defaults = {} if optim.own is None else {field.name: field.default for field in fields(optim.own)}
    if form is None or getattr(optim.own, form) == defaults[form]:
        return optim.name
    return f"{optim.name} optim.{form}={getattr(optim.own, form)}"


def pair_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer | None:
    """The optimizer that needs to know which A belongs to which B, or None where transformers makes it."""
    make = entry_of(optim).make
    return None if make is None else make(model, optim.own, lr=optim.lr, weight_decay=optim.weight_decay)


def stock_arguments(optim: OptimConfig) -> dict[str, Any]:
    """What `transformers.TrainingArguments` is told to make the optimizer; nothing where it is made here."""
    arguments = entry_of(optim).arguments
    if arguments is None:
        return {}
    return {"learning_rate": optim.lr, "weight_decay": optim.weight_decay, **arguments(optim.own)}


def schedule_of_trainer(optim: OptimConfig) -> dict[str, Any]:
    """What `transformers.TrainingArguments` is told of the course of the rate."""
    kind = SCHEDULES.get(optim.schedule).kind or optim.schedule
    own = dict(schedule_arguments(optim.own_of_schedule, optim.rate))
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": own or None, "warmup_steps": optim.warmup or 0.0}


def check_rise(optim: OptimConfig, steps: int, length: str) -> None:
    """Raises ConfigError for a warm-up as long as the training, and for a fall that begins before it ends."""
    warmup = warmup_of(optim, steps)
    if warmup >= max(1, steps):
        raise ConfigError(
            f"optim.warmup={warmup:g} steps are the whole training ({length}), so optim.lr would never be reached. "
            "Give fewer, or a share below 1 such as optim.warmup=0.05."
        )
    fall = getattr(optim.own_of_schedule, "num_decay_steps", 0)
    if steps_of(warmup, steps) + steps_of(fall, steps) > max(steps, 2):
        raise ConfigError(
            f"optim.warmup={warmup:g} and optim.num_decay_steps={fall:g} are more than the whole training "
            f"({length}). Lower one of them."
        )


def warmup_of(optim: OptimConfig, steps: int) -> float:
    """The warm-up of a training of so many steps, as ``optim.warmup`` has it or shortened."""
    warmup = optim.warmup or 0.0
    return float(max(0, steps - 1)) if optim.shorten_warmup and warmup >= max(1, steps) else warmup


def steps_of(number: float, steps: int) -> int:
    """What is given in steps, or as a share of all steps below 1, in steps."""
    return int(number) if number >= 1 else math.ceil(number * steps)
