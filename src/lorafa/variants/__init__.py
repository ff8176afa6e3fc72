"""The formulas of an update, by name, and which of them a config asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from lorafa.errors import ConfigError
from lorafa.initializers import INITIALIZERS, Start
from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.adapter import Stage, Variant
    from lorafa.spec import LayerSpec

VARIANTS: Registry[type[Variant]] = Registry(
    "variant",
    {
        "lora": "lorafa.variants.lora:LoRA",
        "dora": "lorafa.variants.dora:DoRA",
        "lora_sb": "lorafa.variants.lora_sb:LoRASB",
        "kasa": "lorafa.variants.kasa:KaSA",
        "alora": "lorafa.variants.alora:ALoRA",
        "arrow": "lorafa.variants.arrow:Arrow",
        "goat": "lorafa.variants.goat:GOAT",
        "qalora": "lorafa.variants.qalora:QALoRA",
        "bdlora": "lorafa.variants.bdlora:BDLoRA",
        "velora": "lorafa.variants.velora:VeLoRA",
        "monteclora": "lorafa.variants.monteclora:MonteCLoRA",
    },
)


class HasStart(Protocol):
    """A :class:`lorafa.LoraConfig`, of which the fields that variants call their switches are read too."""

    @property
    def start(self) -> Start: ...


def switches() -> dict[str, str]:
    """Field of LoraConfig -> the variant it asks for where it is set."""
    declared = {VARIANTS.get(name).switch: name for name in VARIANTS.names()}
    return {switch: name for switch, name in declared.items() if switch is not None}


def asking_settings() -> dict[str, str]:
    """Variant -> what asks for it, as "use_dora" or "init_lora_weights='lora_sb'"; plain LoRA needs nothing."""
    starts = {name: INITIALIZERS.get(name).variant for name in INITIALIZERS.names()}
    by_start = {
        variant: f"init_lora_weights={name!r}" for name, variant in starts.items() if variant in VARIANTS.names()
    }
    return by_start | {name: switch for switch, name in switches().items()}


def variant_types(config: HasStart) -> tuple[type[Variant], ...]:
    """The formulas a LoraConfig asks for, from the inside out: one that forms B A first, plain LoRA unless it says so.

    Raises:
        ConfigError: it asks for two of one stage.
    """
    from lorafa.adapter import STAGES

    asked = {name: switch for switch, name in switches().items() if getattr(config, switch, None)}
    own = config.start.initializer.variant
    if own is not None and own in VARIANTS.names():
        asked.setdefault(own, "init_lora_weights")
    found: dict[Stage, type[Variant]] = {}
    for name in asked:
        variant = VARIANTS.get(name)
        other = found.setdefault(variant.stage, variant)
        if other is not variant:
            first, second = (f"{asked[one]}={getattr(config, asked[one])!r}" for one in (other.name, name))
            raise ConfigError(
                f"{first} and {second} ask for two formulas, {other.name} and {name}, and an adapter has one of a "
                "kind. Drop one of the two."
            )
    found.setdefault("factors", VARIANTS.get("lora"))
    return tuple(found[stage] for stage in STAGES if stage in found)


def formula_of(types: Iterable[type[Variant]], config: HasStart, spec: LayerSpec) -> Variant:
    """The formula of a config on one layer, each over the one inside it.

    Args:
        types: what :func:`variant_types` says of the config.
    """
    formula: Variant | None = None
    for variant in types:
        formula = variant.of(config, spec, formula)
    assert formula is not None  # there is always one that forms B A
    return formula


def is_plain_lora(config: HasStart) -> bool:
    """Whether the update a config asks for is s B A with A and B as they are stored, and nothing beside them."""
    types = variant_types(config)
    return all(variant.plain and variant.factors_are_stored and not variant.extras for variant in types)
