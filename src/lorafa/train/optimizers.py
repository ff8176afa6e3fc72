"""From the settings of an optimizer to the optimizer: one table says of each what it reads and what it keeps.

The table is read wherever settings are checked and listed; an optimizer, and torch with it, loads when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafa.train.optimizer_state import (
    State,
    moments_of_weights,
    nothing,
    one_buffer,
    rows_and_columns,
    two_moments,
    two_wide_moments,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lorafa.train.schema import OptimConfig

STOCK = {"adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
"""Optimizers that transformers makes -> its name for them."""


@dataclass(frozen=True)
class Kind:
    """An optimizer, or one form of it."""

    make: str | None
    """Name in `lorafa.optimizers` of a function that takes the model, lr, weight_decay and what ``reads`` names; None:
    transformers makes it."""
    reads: Mapping[str, str]
    """Settings that not all optimizers have -> what ``make`` calls them."""
    state: State
    """Bytes it keeps."""
    eps: float = 1e-8
    """Where ``optim.eps`` is not given."""
    freezes_A: bool = False
    over_adamw: bool = False
    """Whether it steps by an optimizer of torch's, for which it is given the fused AdamW."""


_ADAM = {"betas": "betas", "eps": "eps"}
_LORA_FA = {**_ADAM, "algorithm": "algorithm"}
_LORA_PLUS = {**_ADAM, "lr_ratio": "loraplus_lr_ratio"}
_RIEMANNIAN = {**_ADAM, "reg": "reg", "damping": "damping"}
_PRO = {"form": "form", "X": "X", "gram_damping": "damping"}

KINDS: Mapping[tuple[str, ...], Kind] = {
    ("adamw",): Kind(None, _ADAM, two_moments),
    ("adafactor",): Kind(None, {}, rows_and_columns),
    ("sgd",): Kind(None, {}, nothing),
    ("lora_fa",): Kind("create_lorafa_optimizer", _LORA_FA, two_wide_moments, eps=1e-6, freezes_A=True),
    ("lora_fa", "fold"): Kind("create_lorafa_optimizer", _LORA_FA, two_moments, eps=1e-6, freezes_A=True),
    ("lora_plus",): Kind("create_loraplus_optimizer", _LORA_PLUS, two_moments, over_adamw=True),
    ("riemannian",): Kind("create_riemannian_optimizer", _RIEMANNIAN, two_moments, over_adamw=True),
    ("preconditioned",): Kind("create_preconditioned_adamw", {**_ADAM, "prec_reg": "prec_reg"}, two_wide_moments),
    ("lora_pro",): Kind("create_lorapro_optimizer", {**_ADAM, **_PRO}, two_moments),
    ("lora_pro", "sgd"): Kind("create_lorapro_optimizer", {**_PRO, "momentum": "momentum"}, one_buffer),
    ("lora_pro", "full"): Kind("create_lorapro_optimizer", {**_ADAM, **_PRO}, moments_of_weights),
}
"""(name,) or (name, form) -> the optimizer; a form that is not listed is as the name alone."""
FORMS = {"lora_fa": "algorithm", "lora_pro": "form"}
"""Optimizers that come in several forms -> the setting that chooses."""
NAMES = tuple(dict.fromkeys(name for name, *_ in KINDS))


def _key(optim: OptimConfig) -> tuple[str, ...]:
    """The line of ``KINDS`` for these settings."""
    option = FORMS.get(optim.name)
    form = (optim.name, getattr(optim, option)) if option else ()
    return form if form in KINDS else (optim.name,)


def _written(name: str, *form: str) -> str:
    """A line of ``KINDS`` as it is asked for after ``optim=``."""
    return f"{name} optim.{FORMS[name]}={form[0]}" if form else name


def words(optim: OptimConfig) -> str:
    """What is written after ``optim=`` to have this optimizer."""
    return _written(*_key(optim))


def kind_of(optim: OptimConfig) -> Kind:
    return KINDS[_key(optim)]


def owners(option: str) -> list[str]:
    """The optimizers that read a setting, as :func:`words`; a form only where the name alone does not."""
    reading = [key for key, kind in KINDS.items() if option in kind.reads]
    return [_written(*key) for key in reading if len(key) == 1 or key[:1] not in reading]


OPTIONS = tuple(dict.fromkeys(option for kind in KINDS.values() for option in kind.reads))
"""All settings that not all optimizers have."""


def pair_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer | None:
    """The optimizer that needs to know which A belongs to which B, or None where transformers makes it."""
    kind = kind_of(optim)
    if kind.make is None:
        return None
    from lorafa import optimizers

    own: dict[str, Any] = {theirs: getattr(optim, ours) for ours, theirs in kind.reads.items()}
    if kind.over_adamw:
        from torch.optim import AdamW

        own |= {"optimizer_cls": AdamW, "fused": True}
    make: Callable[..., Optimizer] = getattr(optimizers, kind.make)
    return make(model, lr=optim.lr, weight_decay=optim.weight_decay, **own)
