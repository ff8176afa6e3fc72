"""Fields of a config taken back: no start to be made, no formula, plain LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from lorafa.config import LORAFA_ONLY, LoraConfig
from lorafa.initializers.settings import NO_SETTINGS
from lorafa.variants import switches

NO_START: Mapping[str, Any] = {"init_lora_weights": True, **NO_SETTINGS}
"""Fields of an adapter whose start is history: only its tensors matter."""


def defaults_of(names: Iterable[str | None]) -> dict[str, Any]:
    """Fields as they are where nothing is asked for; a name that is None is passed over."""
    wanted = set(names)
    return {field.name: field.default for field in fields(LoraConfig) if field.name in wanted}


def plain_config(config: LoraConfig) -> LoraConfig:
    """The config with the same layers and what is trained beside them, for factors without formula, start or noise."""
    off = defaults_of((*switches(), *LORAFA_ONLY, "lora_dropout", "use_rslora", "ensure_weight_tying"))
    return replace(config, **{**off, **NO_START})
