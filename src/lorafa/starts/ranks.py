"""Ranks from data: an ordinary ``rank_pattern`` and ``alpha_pattern``, chosen by what statistics say of each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from lorafa.calibration import RANK_RULES
from lorafa.calibration.ranking import Asked, Layer, Rule
from lorafa.config import LoraConfig
from lorafa.errors import CalibrationError, ConfigError, did_you_mean, shorten, warn
from lorafa.initializers.base import Initializer
from lorafa.initializers.stages import numerical_rank
from lorafa.settings.checks import check_choice, check_int, found, names
from lorafa.starts.statistics import Statistics
from lorafa.surgery.patterns import any_of, exactly
from lorafa.surgery.resolve import Resolved, met, resolve
from lorafa.surgery.stats import require_statistics
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import Place

Stats = Mapping[str, Mapping[str, Tensor]]
T = TypeVar("T")


@dataclass(frozen=True, init=False)
class RankRule:
    """How ranks are chosen.

    Raises:
        ConfigError: a value is not allowed, or the rule does not read it.
    """

    rule: str
    """"budget": the directions worth most for their parameters, as many as the config's ranks cost together (needs
    gradients; better with halves); "cross_validation": as many as hold what they promise in the other half sample
    (needs halves); "energy": as many as hold ``share`` of the gradient; "stable_rank"; "entropy": as many equal ones as
    would be spread as widely; "explained_variance": EVA's (needs "principal"); "importance": GoRA's, by the mean of
    ``|W o G|`` (needs whole gradients: out x in numbers of float32 for every layer at once, where a sketch of one pass
    takes 4 r out + 8 r in); or one that was added to ``RANK_RULES``."""
    r_min: int | None
    """None: 1, and 2 of "budget" where the config's ranks are above 2 on average (at 2 nothing would be
    left to share out). "explained_variance" has none: a layer may get 0."""
    r_max: int | None
    """None: four times the config's r. "explained_variance" has round(rho r) of each layer. A start that takes
    directions from the statistics gets no more ranks than they have directions for, nor do the rules of a gradient's
    directions, "budget", "cross_validation", "energy" and "entropy": the statistics of a layer hold 4 r of its own r in
    the config they were collected with, with more than one pass 2 r + 8, and LoRA-GA takes two for each rank. For more,
    collect with a larger r."""
    settings: Any
    """The rule's own, an object of the class it declares: ``share`` of "energy" (0.9); ``threshold`` of
    "cross_validation" (0.25: what a direction must hold in the other half, as a share of its singular value); ``rho``
    of "explained_variance" (2: how many times its rank a layer may get, rounded)."""

    def __init__(
        self,
        rule: str = "budget",
        r_min: int | None = None,
        r_max: int | None = None,
        *,
        settings: Any = None,
        **own: Any,
    ) -> None:
        """Own settings are given by their names, ``RankRule("energy", share=0.95)``; None is their default."""
        check_choice("rule", rule, RANK_RULES.names())
        entry = RANK_RULES.get(rule)
        given = {name: value for name, value in own.items() if value is not None}
        for name in given:
            _check_own(name, rule)
        for name, bound in (("r_min", r_min), ("r_max", r_max)):
            if bound is not None and entry.unbounded is not None:
                raise ConfigError(f"{rule!r} does not read {name}: {entry.unbounded}. Drop {name}.")
        if r_min is not None:
            check_int("r_min", r_min, at_least=1)
        if r_max is not None:
            check_int("r_max", r_max, at_least=r_min or 1)
        if settings is None and entry.settings is not None:
            settings = entry.settings(**given)
        for name, value in (("rule", rule), ("r_min", r_min), ("r_max", r_max), ("settings", settings)):
            object.__setattr__(self, name, value)

    @property
    def entry(self) -> Rule:
        """Its line in ``RANK_RULES``."""
        return RANK_RULES.get(self.rule)

    def reads(self) -> dict[str, object]:
        """What :func:`lorafa.collect_statistics` must be told for this rule."""
        return self.entry.reads()


def _check_own(name: str, rule: str) -> None:
    """Raises ConfigError for a setting that the rule does not have."""
    has = {each: _own_names(each) for each in RANK_RULES.names()}
    if name in has[rule]:
        return
    owners = [each for each, names in has.items() if name in names]
    if owners:
        raise ConfigError(
            f"{name} is a setting of the rule {owners[0]!r}, and {rule!r} does not read it. Drop {name}, or set "
            f"rule={owners[0]!r}."
        )
    known = ["r_min", "r_max", *has[rule]]
    raise ConfigError(f"{rule!r} has no setting {name!r}.{did_you_mean(name, known)} It has: {', '.join(known)}.")


def _own_names(rule: str) -> list[str]:
    kind = RANK_RULES.get(rule).settings
    return [] if kind is None else [field.name for field in fields(kind)]


def require_rule(rule: object) -> RankRule:
    """Raises ConfigError for what is no RankRule, such as the name of one."""
    if not isinstance(rule, RankRule):
        raise ConfigError(f"A rule for ranks is a RankRule, found {found(rule)}. Pass RankRule('budget') for example.")
    return rule


def choose_ranks(
    model: nn.Module, config: LoraConfig | Resolved, stats: Stats, rule: RankRule | None = None
) -> dict[str, int]:
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
    rule, resolved = RankRule() if rule is None else require_rule(rule), met(model, config)
    if stats is None:
        raise CalibrationError(
            "Ranks are chosen by statistics, and stats is None. Pass what collect_statistics returned."
        )
    check_readable(resolved, stats, rule)
    return shared_out(resolved, stats, rule)


def check_readable(resolved: Resolved, stats: Stats, rule: RankRule | None = None) -> None:
    """Refuse statistics that are none, of another model, or by other settings than the start or the rule reads.

    Raises:
        CalibrationError: they are.
    """
    require_statistics(stats)
    if isinstance(stats, Statistics):
        stats.check_fits(resolved.model)
        stats.check_read_as(resolved.config, [] if rule is None else names("also", rule.reads()["also"]))


def shared_out(resolved: Resolved, stats: Stats, rule: RankRule) -> dict[str, int]:
    """:func:`choose_ranks` by statistics that were checked."""
    config, targets = resolved.config, resolved.targets
    start, entry = resolved.start.initializer, rule.entry
    layers = {target.full_name: _layer(target, start, stats.get(target.full_name, {})) for target in targets}
    measured = {name: entry.measure(layer, rule.settings) for name, layer in layers.items()}
    measured = _finite(entry.of, measured, entry.is_finite)
    kept = {name: layers[name] for name in measured}
    ranks = entry.choose(Asked(kept, measured, rule.r_min, rule.r_max or 4 * config.r, rule.settings))
    before = {name: layer.rank for name, layer in layers.items()}
    return before | {name: min(rank, layers[name].most) for name, rank in ranks.items()}


def _layer(target: Target, start: Initializer, tensors: Mapping[str, Tensor]) -> Layer:
    shape = target.backend.shape(target.base)
    return Layer(target.full_name, shape, target.rank, _most(start, shape, tensors), tensors, target.weight)


def _most(start: Initializer, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> int:
    """The largest rank a layer (out, in) can start with; 1 where there is none, for the start says what it lacks."""
    known = [tensors.get(f"{name}.{values}") for name in start.needs for values in ("S", "singular_values")]
    taken = [] if start.whole_gradients else [S for S in known if S is not None]
    directions = min([*shape, *(numerical_rank(S, S[0], max(shape)) for S in taken if len(S))])
    return max(directions // start.per_rank, 1)


def _finite(what: str, layers: dict[str, T], is_finite: Callable[[T], bool]) -> dict[str, T]:
    """The layers whose statistics are finite: one that is not would spoil what all layers share."""
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


def with_ranks(
    model: nn.Module, config: LoraConfig | Resolved, ranks: Mapping[str, int], *, keep_scaling: bool = True
) -> LoraConfig:
    """The config with these ranks for its targets, as patterns over full names; a rank of 0 leaves the layer out.

    With ``ensure_weight_tying`` the modules that share a target's weight are targets, too.

    Args:
        ranks: of every target by its full name.
        keep_scaling: change each layer's alpha so that its scaling s stays what the config says for its old rank.

    Raises:
        ConfigError: a target has no rank, a rank no target, or all are 0.
        TargetError: as :func:`lorafa.get_peft_model`.
    """
    return ranked(met(model, config), ranks, keep_scaling=keep_scaling).given


def ranked(resolved: Resolved, ranks: Mapping[str, int], *, keep_scaling: bool = True) -> Resolved:
    """:func:`with_ranks` for a config that has met the model: it and its targets have these ranks then."""
    config, targets = resolved.config, resolved.targets
    _check_ranks(targets, ranks)
    kept = [target for target in targets if ranks[target.full_name]]
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    made: list[Target] = []
    for target in kept:
        rank, key = ranks[target.full_name], exactly(target.full_name)
        alpha = target.alpha * (_rescaling(target.rank, rank, config) if keep_scaling else 1)
        if rank != config.r or target.rank != config.r:  # which something else than r has said
            rank_pattern[key] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[key] = alpha
        made.append(replace(target, rank=rank, alpha=alpha))
    changes: dict[str, object] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if len(kept) == len(targets):
        return resolved.changed(made, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the config means was said when it met the model
        chosen = resolve(resolved.model, replace(resolved.given, **changes | _only(resolved.named, kept)))  # type: ignore[arg-type]
    names = {target.full_name for target in kept}
    extra = [target for target in chosen.targets if target.full_name not in names]
    if extra:
        why = (
            "it shares its weight with a layer that stays, and ensure_weight_tying gives both one adapter"
            if extra[0].parameter is None
            else "target_parameters takes names and their dotted ends, and a parameter that stays is such an end"
        )
        listed = shorten([target.full_name for target in extra], 3)
        raise ConfigError(f"{listed} cannot be left out: {why}. Give both a rank of 1 or more.")
    return chosen


def _check_ranks(targets: list[Target], ranks: Mapping[str, int]) -> None:
    if not isinstance(ranks, Mapping):
        raise ConfigError(
            f"ranks must be a mapping of full names to ranks, as choose_ranks returns, found {found(ranks)}."
        )
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


def _only(named: Iterable[Place], kept: list[Target]) -> dict[str, object]:
    """The fields of a config that name these targets and no other.

    A name in a list also stands for every name that ends in a dot and it: where that is a layer that is left out, a
    regular expression takes the list's place.
    """
    modules = {target.name: target.module for target in kept if target.parameter is None}
    parameters = {target.full_name for target in kept if target.parameter is not None}
    wanted: object = sorted(modules)
    if any(_ends_in(place.name, modules) and place.module not in modules.values() for place in named):
        wanted = any_of(modules)
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
