"""An optimizer as the runner knows it: how it is made, its own settings, what it keeps, what it freezes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lorafa.optimizers.state_bytes import State
from lorafa.settings.checks import check_betas, check_number

Make = Callable[..., Optimizer]
"""(model, own settings, lr=..., weight_decay=...) -> the optimizer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """A line of ``OPTIMIZERS``."""

    lr: float
    """The learning rate where none is given."""
    state: State
    """Bytes it keeps."""
    settings: type[Any] | None = None
    """A frozen dataclass of the settings that not all optimizers have, all with defaults; each is ``optim.<name>``."""
    make: Make | None = None
    """Makes it; None where transformers does."""
    arguments: Callable[[Any], Mapping[str, Any]] | None = None
    """From its own settings to those of `transformers.TrainingArguments`, where transformers makes it."""
    freezes: str = ""
    """The factor that it leaves as it is: "A"."""
    adam_like: bool = True
    """Whether its steps have the size of the rate whatever that of the gradient, so that one rule gives the rates of
    all such optimizers."""
    form: str | None = None
    """The setting that chooses among its forms; one that is not the default is a part of its name."""


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """The settings of an Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""

    def __post_init__(self) -> None:
        check_betas("betas", self.betas)
        check_number("eps", self.eps, "a number > 0", 0)
