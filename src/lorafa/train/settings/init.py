"""The settings of a run that say where A and B start, and how they become those of a LoraConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lorafa.calibration import RANK_RULES, STATISTICS
from lorafa.errors import ConfigError, did_you_mean
from lorafa.initializers import INITIALIZERS, Start, find_start
from lorafa.initializers.settings import SETTINGS_OF_PEFT, settings_class, settings_field
from lorafa.registry import Registry
from lorafa.settings.checks import check_int, found
from lorafa.settings.declared import declared
from lorafa.settings.groups import OpenGroup
from lorafa.settings.typed import Key, build, keys

if TYPE_CHECKING:
    from lorafa.starts.ranks import RankRule
    from lorafa.train.settings.start_names import NamedStart

STARTS: Registry[NamedStart] = Registry(
    "start",
    {
        "default": "lorafa.train.settings.start_names:DEFAULT",
        "svd": "lorafa.train.settings.start_names:SVD",
        "gradient": "lorafa.train.settings.start_names:GRADIENT",
    },
)
"""Names of the runner beside those of INITIALIZERS."""
_READING = ("bsz", "iters", "max_length", "passes")
"""Settings of how data is read."""


@dataclass(frozen=True, kw_only=True)
class InitConfig(OpenGroup):
    """Where A and B start, and what the start reads of the data."""

    group: ClassVar[str] = "init"
    opens: ClassVar[Mapping[str, str]] = {"mode": "own", "ranks": "own_of_rule"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"mode": INITIALIZERS, "ranks": RANK_RULES}

    mode: str = "default"
    """Start: default (A random, B zero), or a name of those that follow."""
    bsz: int = 1
    """Rows in a batch of what is read of the data."""
    iters: int = 8
    """Batches that are read: the first training rows, bsz * iters of them."""
    max_length: int = 1024
    """Longest of these rows in tokens; longer ones are cut."""
    passes: int = 1
    """Times a gradient statistic goes over them: 1, 2, or 4 for a power iteration."""
    ranks: str | None = None
    """Choose each layer's rank by the data: share the parameters of peft.r out by the gradient (budget), or by another
    rule of those that follow; null keeps peft.r everywhere, but for starts with a rule of their own. Rules that compare
    halves of the batches need two batches, but for budget, which then goes by singular values."""
    r_min: int | None = None
    """ranks: the smallest a layer gets; null is 1, and 2 of budget where peft.r is above 2."""
    r_max: int | None = None
    """ranks: the largest; null is four times peft.r."""
    own: Any = None
    """The start's own settings."""
    own_of_rule: Any = None
    """The own settings of the rule for ranks."""

    @classmethod
    def settings_of(cls, field: str, chosen: Any) -> type[Any] | None:
        if field == "ranks":
            return None if chosen is None else super().settings_of(field, chosen)
        if not isinstance(chosen, str):
            raise ConfigError(
                f"init.mode is the name of a start, found {found(chosen)}. Pass 'default' or another name."
            )
        named = STARTS.get(chosen) if chosen in STARTS else None
        if named is not None and named.settings is not None:
            return named.settings
        return settings_class(_start(chosen if named is None else named.start(None)))

    @classmethod
    def entries(cls, field: str) -> list[str]:
        return sorted({*super().entries(field), *(STARTS.names() if field == "mode" else ())})

    @classmethod
    def own_keys(cls, field: str) -> dict[str, list[Key]]:
        """With the settings that PEFT has a field for, and those of the runner's own names of starts."""
        own = super().own_keys(field)
        if field == "mode":
            for name in INITIALIZERS.names():
                of_peft = declared(INITIALIZERS, name).keywords.get("settings", f"{name}_config")
                if of_peft in SETTINGS_OF_PEFT:
                    own[cls.words(field, name)] = list(keys(SETTINGS_OF_PEFT[of_peft]))
            own |= {cls.words(field, name): declared(STARTS, name).settings for name in STARTS.names()}
        return own

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _READING:
            check_int(f"init.{name}", getattr(self, name), at_least=1)
        from lorafa.calibration.base import CalibrationOptions  # with torch, which these settings are read without

        CalibrationOptions(passes=self.passes)
        _refuse_ignored(self)
        if self.ranks is not None and RANK_RULES.get(self.ranks).needs_halves and self.iters == 1:
            raise ConfigError(
                f"init.ranks={self.ranks} compares two halves of the batches, and init.iters is 1. Set it to 2 or "
                "more, or choose another rule."
            )


def start_of(init: InitConfig) -> Start:
    """The start that ``mode`` means."""
    return _start(STARTS.get(init.mode).start(init.own) if init.mode in STARTS else init.mode)


def _start(mode: bool | str) -> Start:
    """Raises ConfigError for what is no name of a start."""
    start = find_start(mode)
    if start is None:
        known = InitConfig.entries("mode")
        raise ConfigError(
            f"init.mode has no value {mode!r}.{did_you_mean(str(mode), known)} Known: {', '.join(known)}."
        )
    return start


def rank_rule(init: InitConfig) -> RankRule | None:
    """How ranks are chosen by the data; None: they are not."""
    from lorafa.starts.ranks import RankRule

    if init.ranks is None:
        return None
    return RankRule(init.ranks, r_min=init.r_min, r_max=init.r_max, settings=init.own_of_rule)


def start_fields(init: InitConfig) -> dict[str, Any]:
    """The fields of a LoraConfig that say the same."""
    start = start_of(init)
    field, own = settings_field(start), init.own
    translated = STARTS.get(init.mode).translated if init.mode in STARTS else None
    kind = settings_class(start)
    if translated is not None and kind is not None:
        own = build(kind, translated(own), "init")
    settings = {} if field is None or own is None else {field: own}
    return {"init_lora_weights": start.value} | settings


def _refuse_ignored(init: InitConfig) -> None:
    """Raises ConfigError for what was set and would change nothing."""
    start_fields(init)
    complete = start_of(init).initializer.complete
    if complete is not None:
        complete(init.own)
    ignored = _ignored_by_ranks(init) | _ignored_in_reading(init)
    if ignored:
        name, reason = next(iter(ignored.items()))
        raise ConfigError(f"init.{name}={getattr(init, name)} would change nothing: {reason}. Drop it.")


def _ignored_by_ranks(init: InitConfig) -> dict[str, str]:
    """Settings of how ranks are chosen, where they are not; each with the reason."""
    if init.ranks is None:
        bounds = [name for name in ("r_min", "r_max") if getattr(init, name) is not None]
        return dict.fromkeys(bounds, "it bounds the ranks that init.ranks chooses, and init.ranks is null")
    rank_rule(init)
    return {}


def _ignored_in_reading(init: InitConfig) -> dict[str, str]:
    """Settings of how data is read that differ from their default, where none is read in that way."""
    changed = [one.name for one in fields(init) if one.name in _READING and getattr(init, one.name) != one.default]
    start, rule = start_of(init).initializer, None if init.ranks is None else RANK_RULES.get(init.ranks)
    if not start.needs and rule is None:
        return dict.fromkeys(changed, f"init.mode={init.mode} reads no data")
    read = (*start.needs, *(() if rule is None else (rule.also,)))
    sketches = any(STATISTICS.get(name).reads_gradient for name in read)
    if sketches and not start.whole_gradients and not (rule is not None and rule.dense):
        return {}
    reason = "only a sketch of gradients takes more than one pass, and none is made here"
    return dict.fromkeys([name for name in changed if name == "passes"], reason)
