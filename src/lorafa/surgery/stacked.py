"""Experts of mixtures, whose layers transformers 5 stacks in parameters of one module, and their routers.

They were linear layers, one for each expert; "all-linear" takes them in as ``target_parameters``. What each was called
is known, so that a name which finds a layer no longer is told what it has become.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lorafa.backends import backend_of
from lorafa.config import LoraConfig
from lorafa.errors import warn
from lorafa.settings.expressions import fits
from lorafa.surgery.patterns import key_of
from lorafa.surgery.walk import Place, dotted_ends, pristine_of

FORMER = {"gate_up_proj": ("w1", "w3", "gate_proj", "up_proj"), "down_proj": ("w2",)}
"""A stacked parameter -> what the layers of one expert were called that it holds."""
FUSED = 2
"""Layers of an expert that ``gate_up_proj`` holds."""


@dataclass(frozen=True)
class Stacked:
    """A parameter that stands for a linear layer, or one of each expert."""

    place: Place
    parameter: str

    @property
    def name(self) -> str:
        return f"{self.place.name}.{self.parameter}"

    def was_called(self) -> list[str]:
        """Names that layers it holds have had, in the module and in one of its experts."""
        return [f"{at}.{n}" for n in FORMER.get(self.parameter, ()) for at in (self.place.name, f"{self.place.name}.0")]


def stacked_parameters(everything: Iterable[Place]) -> list[Stacked]:
    """The weights of experts that transformers marks as such, (E, out, in) or (E, in, out), and of their routers.

    A router is a module beside the experts that is no known layer and whose own ``weight`` has a row an expert.
    """
    listed = list(everything)
    found: list[Stacked] = []
    for place in listed:
        experts = pristine_of(place.module)
        if "is_transposed" not in vars(experts):
            continue
        weights = {name: p for name, p in experts.named_parameters(recurse=False) if p.dim() == 3}
        if not weights:
            continue
        count, owner = next(iter(weights.values())).shape[0], place.name.rpartition(".")[0]
        beside = (p for p in listed if p.name.rpartition(".")[0] == owner)
        found += [Stacked(p, "weight") for p in beside if _routes(pristine_of(p.module), count)]
        found += [Stacked(place, name) for name in weights]
    return found


def _routes(module: nn.Module, experts: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[0] == experts and backend_of(module) is None


def name_stacked(draft: LoraConfig, everything: Sequence[Place], kept: Collection[str]) -> None:
    """Let ``target_parameters`` of a draft that means all linear layers name stacked experts and routers too.

    ``gate_up_proj`` holds two layers of an expert, so it gets twice the rank, and the alpha that keeps the scaling,
    unless ``rank_pattern`` says another: as PEFT does.

    Args:
        kept: full names of the parameters that ``exclude_modules`` leaves.
    """
    if not kept:
        return
    given = draft.target_parameters or []
    names = _short_names(everything, [name for name in kept if not _means(given, name)], kept)
    ranks, alphas = dict(draft.rank_pattern), dict(draft.alpha_pattern)
    for name in (name for name in kept if name.rpartition(".")[2] == "gate_up_proj"):
        if key_of(draft.rank_pattern, name) is None:
            key = r".*\.gate_up_proj"
            ranks[key] = FUSED * draft.r
            alphas.setdefault(key, draft.lora_alpha * (math.sqrt(FUSED) if draft.use_rslora else FUSED))
    draft.target_parameters, draft.rank_pattern, draft.alpha_pattern = [*given, *names], ranks, alphas


def _short_names(everything: Sequence[Place], names: Collection[str], kept: Collection[str]) -> list[str]:
    """The shortest ends of ``names`` that mean parameters in ``kept`` alone."""
    every = {f"{p.name}.{n}" for p in everything for n, _ in pristine_of(p.module).named_parameters(recurse=False)}
    others = {end for name in every if name not in kept for end in dotted_ends(name)}
    short = (next((end for end in dotted_ends(name) if end not in others), name) for name in names)
    return list(dict.fromkeys(short))


def meant(stacked: Iterable[Stacked], wanted: Collection[str] | str) -> list[str]:
    """Names for ``target_parameters`` of those that ``target_modules`` means, by their own name or an older one.

    Args:
        wanted: a regular expression for the whole name, or names and dotted ends.
    """
    found = (s for s in stacked if any(_means(wanted, name) for name in (s.name, *s.was_called())))
    return list(dict.fromkeys(s.parameter for s in found))


def warn_of_left_out(everything: Iterable[Place], config: LoraConfig, taken: Collection[str]) -> None:
    """Warn of experts that a name in ``target_modules`` would have meant while they were layers.

    Args:
        taken: full names of the parameters that are targets.
    """
    excluded = config.exclude_modules or ()
    stacked = (
        s
        for s in (stacked_parameters(everything) if config.target_modules else ())
        if s.name not in taken and not _means(excluded, s.place.name) and not _means(excluded, s.name)
    )
    names = meant(stacked, config.target_modules or ())
    if names:
        warn(
            f"target_modules={config.target_modules!r} also names layers of experts, which are no modules here but "
            f"stacked in parameters: these are left out. Set target_parameters={names!r} to adapt them too, or "
            "exclude_modules to say that they are not meant."
        )


def _means(wanted: Collection[str] | str, name: str) -> bool:
    if isinstance(wanted, str):
        return fits("target_modules", wanted, name)
    return any(end in wanted for end in dotted_ends(name))
