"""Which start reads which settings: the fields of PEFT's LoraConfig, and ``init_config`` for all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafa.initializers import INITIALIZERS, Start
from lorafa.settings.methods import CordaConfig, EvaConfig, KasaConfig, LoftQConfig, LoraGAConfig

SETTINGS_OF_PEFT: Mapping[str, type[Any]] = {
    "loftq_config": LoftQConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "kasa_config": KasaConfig,
}
"""The nested configs of starts that PEFT has, each called after its start, and their classes."""
START_SETTINGS = (*SETTINGS_OF_PEFT, "init_config")
"""The nested configs of PEFT, and the one for all other starts."""
NO_SETTINGS: Mapping[str, Any] = {name: {} if name == "loftq_config" else None for name in START_SETTINGS}
"""The value of each of them that says nothing."""


def settings_field(start: Start) -> str | None:
    """The field of LoraConfig with the settings of a start, None where it has none."""
    declared = start.initializer.settings
    own = declared if isinstance(declared, str) else f"{start.name}_config"
    if own in START_SETTINGS:
        return own
    return "init_config" if declared else None


def settings_class(start: Start) -> type[Any] | None:
    """The dataclass of a start's settings, None where it has none or takes any."""
    declared = start.initializer.settings
    return SETTINGS_OF_PEFT.get(settings_field(start) or "") or (declared if isinstance(declared, type) else None)


def start_meant(value: Any, settings: Mapping[str, Any]) -> Any:
    """The value of ``init_lora_weights``, or the start that settings ask for by themselves where it is True.

    Args:
        settings: fields of LoraConfig, by name; those that are missing are not set.
    """
    for name in SETTINGS_OF_PEFT if value is True else ():
        start = name.removesuffix("_config")
        if settings.get(name) and INITIALIZERS.get(start).asked_by_settings:
            return start
    return value
