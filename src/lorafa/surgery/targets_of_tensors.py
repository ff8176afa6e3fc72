"""Targets that the tensors of an adapter name by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import TargetError, did_you_mean, shorten
from lorafa.surgery.patterns import any_of
from lorafa.surgery.walk import PREFIX, places, uncompiled_name

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def with_targets_of(state_dict: Mapping[str, Tensor], config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config with the layers as targets that the tensors of an adapter belong to, each by its full name.

    Raises:
        TargetError: they have no factors of a layer, or of one the model does not have.
    """
    names = {place.name for place in places(model)}
    keys = (uncompiled_name(key).removeprefix(PREFIX) for key in state_dict)
    found = {key.partition(f".{factor}")[0] for key in keys for factor in _FACTORS if f".{factor}" in key}
    if not found:
        raise TargetError(
            f"state_dict has no factors of a LoRA adapter; its keys are: {shorten(state_dict, 3) or '(none)'}. Pass "
            "what get_peft_model_state_dict or load_peft_weights returned, or leave it out to go by target_modules."
        )
    unknown = sorted(found - names)
    if unknown:
        raise TargetError(
            f"state_dict has factors of {len(unknown)} layers that the model does not have: {shorten(unknown, 3)}."
            f"{did_you_mean(unknown[0], names)} It was made for another model."
        )
    return replace(config, target_modules=any_of(found), layers_to_transform=None, layers_pattern=None)
