"""The formulas of an update, by name, and which of them a config asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.errors import ConfigError
from lorafa.initializers import INITIALIZERS, find_start
from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.variants.base import Variant

VARIANTS: Registry[type[Variant]] = Registry(
    "variant",
    {
        "lora": "lorafa.variants.lora:LoRA",
        "dora": "lorafa.variants.dora:DoRA",
        "lora_sb": "lorafa.variants.lora_sb:LoRASB",
        "kasa": "lorafa.variants.kasa:KaSA",
    },
)


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


def variant_of(config: object) -> type[Variant]:
    """The variant a LoraConfig asks for.

    Raises:
        ConfigError: it asks for two.
    """
    asked = {switch: name for switch, name in switches().items() if getattr(config, switch, None)}
    start = find_start(getattr(config, "init_lora_weights", None))
    if start is not None and start.initializer.variant in VARIANTS.names():
        asked["init_lora_weights"] = start.initializer.variant
    if len(asked) > 1:
        first, second = (f"{setting}={getattr(config, setting)!r}" for setting in list(asked)[:2])
        raise ConfigError(
            f"{first} and {second} ask for two formulas, {' and '.join(list(asked.values())[:2])}, and an adapter has "
            "one. Drop one of the two."
        )
    return VARIANTS.get(next(iter(asked.values()), "lora"))
