"""Which modules a config means, one name at a time, as PEFT's own functions are asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.settings.expressions import fits
from lorafa.surgery.patterns import key_of
from lorafa.surgery.targets import is_meant
from lorafa.surgery.walk import lora_layers, uncompiled_name


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first key of ``rank_pattern`` or ``alpha_pattern`` that means a layer; the layer's name where none does."""
    found = key_of(tuple(pattern_keys), key_to_match)
    return key_to_match if found is None else found


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """The match of a regular expression with a whole name, or None."""
    return re.fullmatch(target_pattern, key) if fits("target_modules", target_pattern, key) else None


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether a config means the module of this name as a target: not excluded, nor copied whole.

    Raises:
        ConfigError: the config leaves the targets to the model, or says "all-linear", so that names do not tell.
    """
    wanted = config.target_modules
    if wanted is None and config.target_parameters:
        return False
    if wanted is None or wanted == "all-linear":
        raise ConfigError(
            f"target_modules={wanted!r} is settled by a model, so a name alone does not tell whether it is meant. Take "
            "the config of an adapted model, model.peft_config[name], which lists the layers."
        )
    return is_meant(config, key)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of the modules that carry an adapter, "matched", and of all others, "unmatched".

    Args:
        tuner: a LoraModel, or a PeftModel.
    """
    model: nn.Module = tuner.model
    carrying = {path for path, layer in lora_layers(model) if adapter_name in layer.adapters}
    names = [uncompiled_name(name) for name, _ in model.named_modules()]
    return {
        "matched": [name for name in names if name in carrying],
        "unmatched": [name for name in names if name not in carrying],
    }
