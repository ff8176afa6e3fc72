"""The settings of a run that say where A and B start, and how they become those of a LoraConfig.

The class is read to list the settings too, so starts and statistics load when settings are checked, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lorafa.calibration import STATISTICS
from lorafa.checks import check_int, found
from lorafa.config_checks import settings_class, settings_field
from lorafa.errors import ConfigError, did_you_mean
from lorafa.initializers import INITIALIZERS, Start, find_start

if TYPE_CHECKING:
    from lorafa.ranks import RankRule

STARTS: Mapping[str, bool | str] = {"default": True, "kaiming": True, "random": False, "svd": "pissa"}
"""Names of starts that LoraConfig spells otherwise; "svd" is what LoRA-One's scripts call PiSSA."""
ONE_STEP = ("LoRA-One", "LoRA-FA")
"""Directions of mode "gradient" that are LoRA-One's; the second is what some documents call it."""
SCALES = {"gd": "gd_scale", "weightS": "weight_svd"}
"""Scales of LoRA-GA by their names in its authors' scripts -> PEFT's."""

_READING = ("bsz", "iters", "max_length", "passes")
"""Settings of how data is read."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where A and B start, and what the start reads of the data."""

    mode: str = "default"
    """Start: default (A random, B zero), random, gaussian, orthogonal; pissa (svd), milora, olora, mica, kasa, loftq
    from the weights; lora_one, lora_ga, functional, gora, lora_sb (gradient: the one direction names) from gradients;
    eva, corda, lora_null from inputs."""
    direction: Literal["LoRA-One", "LoRA-FA", "ArB2r", "A2rBr", "ArBr", "random"] | None = None
    """gradient: LoRA-One (LoRA-FA is another name for it), or one of LoRA-GA's, which lora_ga takes too."""
    scale: Literal["stable", "gd", "unit", "weightS", "gd_scale", "weight_svd"] | None = None
    """lora_one, functional, lora_ga: how large the start is; null takes the method's own."""
    stable_gamma: float | Literal["auto"] | None = None
    """Same starts: gamma of scale stable; auto (not lora_ga) tries six on rows the statistics have not seen."""
    normalize: Literal["layer", "global", "none"] | None = None
    """lora_one, functional: what singular values are divided by."""
    step: float | None = None
    """gora: the first step as a share of the gradient's norm."""
    share_ranks: bool | None = None
    """gora: give each layer a rank by its importance, from r / 2 to 4 r; false keeps peft.r everywhere."""
    eta: float | None = None
    """lora_sb: by how much the first step would change every entry of a weight."""
    rho: float | None = None
    """eva: how many times its rank a layer may get; 1 keeps all ranks."""
    tau: float | None = None
    """eva: cosine of successive directions at which they count as settled."""
    whiten: bool | None = None
    """eva: divide directions by the root of their singular value."""
    corda_method: Literal["ipm", "kpm"] | None = None
    """corda: adapt the directions that matter most for the data, or least."""
    loftq_bits: Literal[4, 8] | None = None
    """loftq: bits of the quantized base."""
    loftq_iter: int | None = None
    """loftq: alternations of quantizing and fitting."""
    exact: bool | None = None
    """pissa: decompose whole weights."""
    pivoted: bool | None = None
    """olora: the columns that stick out farthest instead of the first."""
    bsz: int = 1
    """Rows in a batch of what is read of the data."""
    iters: int = 8
    """Batches that are read: the first training rows, bsz * iters of them."""
    max_length: int = 1024
    """Longest of these rows in tokens; longer ones are cut."""
    passes: int = 1
    """Times a gradient statistic goes over them: 1, 2, or 4 for a power iteration."""
    ranks: (
        Literal["budget", "cross_validation", "energy", "stable_rank", "entropy", "importance", "explained_variance"]
        | None
    ) = None
    """Choose each layer's rank by its gradient: the parameters of peft.r shared out (budget), or a rule for each layer;
    by its inputs as EVA does (explained_variance); null keeps peft.r everywhere, but for eva and gora, which have rules
    of their own. budget and cross_validation compare halves of the batches; of a single one, budget goes by singular
    values."""
    r_min: int | None = None
    """ranks: the smallest a layer gets; null is 1, and 2 of budget where peft.r is above 2."""
    r_max: int | None = None
    """ranks: the largest; null is four times peft.r."""

    def __post_init__(self) -> None:
        from lorafa.calibration.base import CalibrationOptions

        for name in _READING:
            check_int(f"init.{name}", getattr(self, name), at_least=1)
        CalibrationOptions(passes=self.passes)
        _refuse_ignored(self)
        start_fields(self)
        if self.ranks == "cross_validation" and self.iters == 1:
            raise ConfigError(
                "init.ranks=cross_validation compares two halves of the batches, and init.iters is 1. Set it to 2 or "
                "more, or choose another rule."
            )


def start_of(init: InitConfig) -> Start:
    """What ``mode`` and ``direction`` mean.

    Raises:
        ConfigError: an unknown mode.
    """
    if not isinstance(init.mode, str):
        raise ConfigError(
            f"init.mode is the name of a start, found {found(init.mode)}. Pass 'default' or another name."
        )
    mode: bool | str = STARTS.get(init.mode, init.mode)
    if mode == "gradient":
        mode = "lora_one" if init.direction in (None, *ONE_STEP) else "lora_ga"
    start = find_start(mode)
    if start is None:
        known = list(dict.fromkeys(["default", "gradient", "kaiming", "svd", *INITIALIZERS.names()]))
        raise ConfigError(
            f"init.mode has no value {init.mode!r}.{did_you_mean(init.mode, known)} Known: {', '.join(known)}."
        )
    return start


def rank_rule(init: InitConfig) -> RankRule | None:
    """How ranks are chosen by the data; None: they are not."""
    if init.ranks is None:
        return None
    from lorafa.ranks import RankRule

    rho = init.rho if init.ranks == "explained_variance" else None
    return RankRule(init.ranks, r_min=init.r_min, r_max=init.r_max, rho=rho)


def start_fields(init: InitConfig) -> dict[str, Any]:
    """The fields of a LoraConfig that say the same.

    Raises:
        ConfigError: an unknown mode, or a setting that belongs to another start.
    """
    start = start_of(init)
    of_lora_ga = start.name.startswith("lora_ga")
    settings = {
        "direction": init.direction if of_lora_ga or init.mode != "gradient" else None,
        "scale": SCALES.get(init.scale or "", init.scale) if of_lora_ga else init.scale,
        "stable_gamma": init.stable_gamma,
        "normalize": init.normalize,
        "step": init.step,
        "share_ranks": init.share_ranks,
        "eta": init.eta,
        "rho": init.rho,
        "tau": init.tau,
        "whiten": init.whiten,
        "corda_method": init.corda_method,
        "loftq_bits": init.loftq_bits,
        "loftq_iter": init.loftq_iter,
        "exact": init.exact,
        "pivoted": init.pivoted,
    }
    field, kind = settings_field(start), settings_class(start)
    known = {one.name for one in fields(kind)} if kind is not None else set()
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"init.{name} does not belong to init.mode={init.mode}, which has "
                f"{', '.join(name for name in settings if name in known) or 'no settings of its own'}. Drop it, or "
                "choose another start."
            )
    own = {field: kind(**given)} if field is not None and kind is not None else {}
    return {"init_lora_weights": start.value} | own


def _refuse_ignored(init: InitConfig) -> None:
    """Raises ConfigError for what was set and would change nothing."""
    ignored = _ignored_by_ranks(init) | _ignored_in_reading(init)
    if init.scale not in (None, "stable") and init.stable_gamma is not None:
        ignored |= {"stable_gamma": f"it is the gamma of init.scale=stable, and init.scale is {init.scale}"}
    if ignored:
        name, reason = next(iter(ignored.items()))
        raise ConfigError(f"init.{name}={getattr(init, name)} would change nothing: {reason}. Drop it.")


def _ignored_by_ranks(init: InitConfig) -> dict[str, str]:
    """Settings of how ranks are chosen, where they are not or by another rule; each with the reason."""
    if init.ranks is None:
        nothing = {"r_min": (None, 1), "r_max": (None,)}  # every rank is at least 1, which older runs have written down
        bounds = [name for name, unset in nothing.items() if getattr(init, name) not in unset]
        return dict.fromkeys(bounds, "it bounds the ranks that init.ranks chooses, and init.ranks is null")
    rank_rule(init)
    return {} if init.share_ranks is None else {"share_ranks": f"init.ranks={init.ranks} chooses the ranks"}


def _ignored_in_reading(init: InitConfig) -> dict[str, str]:
    """Settings of how data is read that differ from their default, where none is read in that way."""
    changed = [one.name for one in fields(init) if one.name in _READING and getattr(init, one.name) != one.default]
    start = start_of(init).initializer
    if not start.needs and init.ranks is None:
        return dict.fromkeys(changed, f"init.mode={init.mode} reads no data")
    by_gradient = init.ranks not in (None, "explained_variance")
    sketches = by_gradient or any(STATISTICS.get(need).reads_gradient for need in start.needs)
    if sketches and not start.whole_gradients and init.ranks != "importance":
        return {}
    reason = "only a sketch of gradients takes more than one pass, and none is made here"
    return dict.fromkeys([name for name in changed if name == "passes"], reason)
