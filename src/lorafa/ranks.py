"""Ranks from data: an ordinary ``rank_pattern`` and ``alpha_pattern``, chosen by what statistics say of each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from lorafa.calibration.spectrum import (
    SHARE,
    THRESHOLD,
    Spectrum,
    by_budget,
    by_cross_validation,
    by_energy,
    by_entropy,
    by_explained_variance,
    by_importance,
    by_stable_rank,
    importance_of,
    most_components,
    variance_shares,
)
from lorafa.checks import check_choice, check_int, check_number, found, names
from lorafa.config import LoraConfig
from lorafa.errors import CalibrationError, ConfigError, shorten, warn
from lorafa.initializers.base import Initializer
from lorafa.initializers.stages import numerical_rank
from lorafa.statistics import Statistics, require_statistics
from lorafa.surgery.given import lora_config
from lorafa.surgery.targets import Target, find_targets
from lorafa.surgery.walk import places, user_model

RULES = ("budget", "cross_validation", "energy", "stable_rank", "entropy", "explained_variance", "importance")
RHO = 2.0
"""Of "explained_variance"."""
_OWNERS = {"share": "energy", "threshold": "cross_validation", "rho": "explained_variance"}
"""Settings that one rule alone reads."""
Stats = Mapping[str, Mapping[str, Tensor]]
T = TypeVar("T")


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen.

    Raises:
        ConfigError: a value is not allowed, or the rule does not read it.
    """

    rule: str = "budget"
    """"budget": the directions worth most for their parameters, as many as the config's ranks cost together (needs
    gradients; better with halves); "cross_validation": as many as hold what they promise in the other half sample
    (needs halves); "energy": as many as hold ``share`` of the gradient; "stable_rank"; "entropy": as many equal ones as
    would be spread as widely; "explained_variance": EVA's (needs "principal"); "importance": GoRA's, by mean |W o G|
    (needs whole gradients: out x in numbers of float32 for every layer at once, where a sketch of one pass takes
    4 r out + 8 r in)."""
    r_min: int | None = None
    """None: 1, and 2 of "budget" where the config's ranks are above 2 on average (at 2 nothing would be
    left to share out). "explained_variance" has none: a layer may get 0."""
    r_max: int | None = None
    """None: four times the config's r. "explained_variance" has round(rho r) of each layer. A start that takes
    directions from the statistics gets no more ranks than they have directions for, nor do the rules of a gradient's
    directions, "budget", "cross_validation", "energy" and "entropy": the statistics of a layer hold 4 r of its own r in
    the config they were collected with, with more than one pass 2 r + 8, and LoRA-GA takes two for each rank. For more,
    collect with a larger r."""
    share: float | None = None
    """Of "energy", None: 0.9."""
    threshold: float | None = None
    """Of "cross_validation", None: 0.25. What a direction must hold in the other half, as a share of its singular
    value."""
    rho: float | None = None
    """Of "explained_variance", None: 2. How many times its rank a layer may get, rounded."""

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        for name, owner in _OWNERS.items():
            if getattr(self, name) is not None and self.rule != owner:
                raise ConfigError(
                    f"{name} is a setting of the rule {owner!r}, and {self.rule!r} does not read it. Drop {name}, or "
                    f"set rule={owner!r}."
                )
        for name in ("r_min", "r_max"):
            if getattr(self, name) is not None and self.rule == "explained_variance":
                raise ConfigError(
                    f"'explained_variance' gives a layer 0 to round(rho r) ranks and does not read {name}. Drop "
                    f"{name}; rho bounds ranks from above."
                )
        if self.r_min is not None:
            check_int("r_min", self.r_min, at_least=1)
        if self.r_max is not None:
            check_int("r_max", self.r_max, at_least=self.r_min or 1)
        for name, value in (("share", self.share), ("threshold", self.threshold)):
            if value is not None:
                check_number(name, value, "a number in (0, 1]", 0, 1, closed="]")
        if self.rho is not None:
            check_number("rho", self.rho, "a number >= 1", 1.0, closed="[")

    def reads(self) -> dict[str, object]:
        """What :func:`lorafa.collect_statistics` must be told for this rule."""
        if self.rule == "explained_variance":
            return {"also": ("principal",)}
        if self.rule == "importance":
            return {"also": ("gradient",), "dense": True}
        return {"also": ("gradient",), "halves": self.rule in ("budget", "cross_validation")}


def require_rule(rule: object) -> RankRule:
    """Raises ConfigError for what is no RankRule, such as the name of one."""
    if not isinstance(rule, RankRule):
        raise ConfigError(f"A rule for ranks is a RankRule, found {found(rule)}. Pass RankRule('budget') for example.")
    return rule


def choose_ranks(model: nn.Module, config: LoraConfig, stats: Stats, rule: RankRule | None = None) -> dict[str, int]:
    """The rank of every target by its full name; the model is only read.

    No layer gets more than the config's start can be made with: min(out, in), and the directions its statistics hold.
    A layer whose statistics are not finite keeps the rank it has in the config, which a warning says; the others share
    what theirs cost.

    Raises:
        CalibrationError: the statistics are of another model or by other settings, lack what the rule reads, or are
            finite for no layer.
        ConfigError: ``rule`` is no RankRule, the budget is too small, or every layer would get rank 0.
        TargetError: as :func:`lorafa.get_peft_model`.
    """
    rule, model = RankRule() if rule is None else require_rule(rule), user_model(model)
    config = lora_config(config)
    if stats is None:
        raise CalibrationError(
            "Ranks are chosen by statistics, and stats is None. Pass what collect_statistics returned."
        )
    require_statistics(stats)
    if isinstance(stats, Statistics):
        stats.check_fits(model)
        stats.check_read_as(config, names("also", rule.reads()["also"]))
    targets = find_targets(model, config)
    before = {target.full_name: target.rank for target in targets}
    shapes = {target.full_name: target.backend.shape(target.base) for target in targets}
    start = config.start.initializer
    most = {name: _most(start, shape, stats.get(name, {})) for name, shape in shapes.items()}
    if rule.rule == "explained_variance":
        rho = rule.rho or RHO
        ratios = {target.full_name: _ratios(target, stats, rho)[: most[target.full_name]] for target in targets}
        ratios = _finite("input", ratios, lambda one: bool(one.isfinite().all()))
        return before | _all_of(by_explained_variance(ratios, {name: before[name] for name in ratios}, rho), before)
    spectra = {name: Spectrum.of(name, stats.get(name, {}), shape) for name, shape in shapes.items()}
    spectra = _finite("gradient", spectra, lambda one: one.finite)
    targets = [target for target in targets if target.full_name in spectra]
    shapes = {name: shapes[name] for name in spectra}
    budget = sum(before[name] * one.cost for name, one in spectra.items())
    average = budget / sum(one.cost for one in spectra.values())
    r_max = rule.r_max or 4 * config.r
    r_min = rule.r_min or (2 if rule.rule == "budget" and average > 2 and r_max >= 2 else 1)
    choose: dict[str, Callable[[], dict[str, int]]] = {
        "budget": lambda: by_budget({n: one.first(most[n]) for n, one in spectra.items()}, budget, r_max, r_min),
        "cross_validation": lambda: by_cross_validation(spectra, r_max, r_min, rule.threshold or THRESHOLD),
        "energy": lambda: by_energy(spectra, r_max, r_min, rule.share or SHARE),
        "stable_rank": lambda: by_stable_rank(spectra, r_max, r_min),
        "entropy": lambda: by_entropy(spectra, r_max, r_min),
        "importance": lambda: by_importance(_importance(targets, stats), shapes, average, r_min, r_max),
    }
    return before | {name: min(rank, most[name]) for name, rank in choose[rule.rule]().items()}


def _most(start: Initializer, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> int:
    """The largest rank a layer (out, in) can start with; 1 where there is none, for the start says what it lacks."""
    known = [tensors.get(f"{name}.{values}") for name in start.needs for values in ("S", "singular_values")]
    taken = [] if start.whole_gradients else [S for S in known if S is not None]
    directions = min([*shape, *(numerical_rank(S, S[0], max(shape)) for S in taken if len(S))])
    return max(directions // start.per_rank, 1)


def _finite(what: str, layers: dict[str, T], is_finite: Callable[[T], bool]) -> dict[str, T]:
    """Those whose statistics are: one that is not would spoil what all layers share."""
    found = {name: one for name, one in layers.items() if is_finite(one)}
    bad = [name for name in layers if name not in found]
    if not found:
        raise CalibrationError(
            f"No layer has a finite {what}, so there is nothing to choose ranks by. Check the data, and that the "
            "model's loss on them is finite."
        )
    if bad:
        warn(
            f"The {what} of {len(bad)} of {len(layers)} layers is not finite, and their ranks stay as they are: "
            f"{shorten(bad, 3)}."
        )
    return found


def _all_of(ranks: dict[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """Warn where there were fewer directions than the config has ranks; raise where there were none."""
    given, asked = sum(ranks.values()), sum(before[name] for name in ranks)
    if not given:
        raise ConfigError("Every layer would get rank 0: the statistics see no direction at all. Use more data.")
    if given < asked:
        warn(
            f"The data has {given} principal directions for the {asked} ranks of the config: the adapter is smaller "
            "than it says. Use more data."
        )
    return ranks


def _ratios(target: Target, stats: Stats, rho: float) -> Tensor:
    name, tensors = target.full_name, stats.get(target.full_name, {})
    if "principal.singular_values" not in tensors:
        raise CalibrationError(
            f"There are no principal directions of the input of {name!r} to choose a rank by. Collect statistics with "
            "also=['principal'], or use another rule."
        )
    held, in_ = len(tensors["principal.singular_values"]), target.backend.shape(target.base)[1]
    wanted = min(most_components(rho, target.rank), in_)
    if held < wanted:
        raise CalibrationError(
            f"'explained_variance' with rho={rho:g} chooses among the first {wanted} principal directions of the input "
            f"of {name!r}, and its statistics hold {held}: round(rho r), with the rho of EvaConfig where that is the "
            "start's and 2 otherwise. Set the same rho in the rule and in EvaConfig, or collect with a larger r."
        )
    return variance_shares(tensors["principal.singular_values"], tensors["principal.total_variance"])


def _importance(targets: list[Target], stats: Stats) -> dict[str, float]:
    sketched = [target.full_name for target in targets if "gradient.dense" not in stats[target.full_name]]
    if sketched:
        raise CalibrationError(
            f"Importance is the mean of |W o G|, and the statistics of {shorten(sketched, 3)} hold a sketch of the "
            "gradient, whose entries are smaller. Collect them with dense=True, or use another rule."
        )
    return {t.full_name: importance_of(t.weight().detach(), stats[t.full_name]["gradient.dense"]) for t in targets}


def with_ranks(
    model: nn.Module, config: LoraConfig, ranks: Mapping[str, int], *, keep_scaling: bool = True
) -> LoraConfig:
    """The config with these ranks for its targets, as patterns over full names; a rank of 0 leaves the layer out.

    Args:
        ranks: of every target by its full name.
        keep_scaling: change each layer's alpha so that its scaling s stays what the config says for its old rank.

    Raises:
        ConfigError: a target has no rank, a rank no target, or all are 0.
        TargetError: as :func:`lorafa.get_peft_model`.
    """
    model = user_model(model)
    config = lora_config(config)
    targets = find_targets(model, config)
    _check_ranks(targets, ranks)
    kept = [target for target in targets if ranks[target.full_name]]
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    for target in kept:
        rank, key = ranks[target.full_name], f"^{re.escape(target.full_name)}"
        alpha = target.alpha * (_rescaling(target.rank, rank, config) if keep_scaling else 1)
        if rank != config.r:
            rank_pattern[key] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[key] = alpha
    changes: dict[str, object] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if len(kept) == len(targets):
        return replace(config, **changes)  # type: ignore[arg-type]
    chosen = replace(config, **changes | _only(model, kept))  # type: ignore[arg-type]
    names = {target.full_name for target in kept}
    extra = [target.full_name for target in find_targets(model, chosen) if target.full_name not in names]
    if extra:
        raise ConfigError(
            f"{shorten(extra, 3)} cannot be left out: target_parameters takes names and their dotted ends, and a "
            "parameter that stays is such an end. Give both a rank of 1 or more."
        )
    return chosen


def _check_ranks(targets: list[Target], ranks: Mapping[str, int]) -> None:
    if not isinstance(ranks, Mapping):
        raise ConfigError(f"ranks must be a mapping of full names to ranks, found {found(ranks)}.")
    names = [target.full_name for target in targets]
    missing, unknown = [name for name in names if name not in ranks], [name for name in ranks if name not in names]
    if missing or unknown:
        raise ConfigError(
            "ranks must have the full name of every target of the config and no other, as choose_ranks gives them. "
            f"Missing: {shorten(missing, 3) or 'none'}. Not targeted: {shorten(unknown, 3) or 'none'}."
        )
    for name, rank in ranks.items():
        check_int(f"ranks[{name!r}]", rank, at_least=0)
    if not any(ranks.values()):
        raise ConfigError("Every rank is 0, so no layer would have an adapter. Give one layer a rank of 1 or more.")


def _only(model: nn.Module, kept: list[Target]) -> dict[str, object]:
    """The fields of a config that name these targets and no other.

    A name in a list also stands for every name that ends in a dot and it: where that is a layer that is left out, a
    regular expression takes the list's place.
    """
    modules = {target.name: target.module for target in kept if target.parameter is None}
    parameters = {target.full_name for target in kept if target.parameter is not None}
    wanted: object = sorted(modules)
    if any(_ends_in(place.name, modules) and place.module not in modules.values() for place in places(model)):
        wanted = "|".join(map(re.escape, sorted(modules)))
    changes = {"target_modules": wanted, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return changes | {"target_parameters": sorted(parameters) or None}


def _ends_in(name: str, ends: Collection[str]) -> bool:
    """Whether a name ends in a dot and one of ``ends``."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in ends for start in range(1, len(parts)))


def _rescaling(old: int, new: int, config: LoraConfig) -> float:
    """What alpha is multiplied with for a scaling that stays: of alpha / r exactly new / old."""
    alpha = float(old * new)  # divides by both without rounding
    return config.scaling(old, alpha) / config.scaling(new, alpha)
