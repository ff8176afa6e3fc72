"""The formulas of an update, by name, and which of them a config asks for."""

from __future__ import annotations

from lorafa.errors import ConfigError
from lorafa.registry import Registry
from lorafa.variants.base import Variant

VARIANTS: Registry[type[Variant]] = Registry(
    "variant",
    {
        "lora": "lorafa.variants.lora:LoRA",
        "dora": "lorafa.variants.dora:DoRA",
    },
)


def switches() -> dict[str, str]:
    """Field of LoraConfig -> the variant it asks for where it is set; plain LoRA needs none."""
    declared = {VARIANTS.get(name).switch: name for name in VARIANTS.names()}
    return {switch: name for switch, name in declared.items() if switch is not None}


def variant_of(config: object) -> type[Variant]:
    """The variant a LoraConfig asks for.

    Raises:
        ConfigError: it asks for two.
    """
    asked = {switch: name for switch, name in switches().items() if getattr(config, switch, None)}
    if len(asked) > 1:
        first, second = (f"{switch}={getattr(config, switch)!r}" for switch in list(asked)[:2])
        raise ConfigError(
            f"{first} and {second} ask for two formulas, {' and '.join(list(asked.values())[:2])}, and an adapter has "
            "one. Drop one of the two."
        )
    return VARIANTS.get(next(iter(asked.values()), "lora"))
