"""An adapter on a model that is not wrapped: the user keeps the model, and its layers carry the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import TargetError, did_you_mean, shorten
from lorafa.surgery import activate
from lorafa.surgery.build import Options
from lorafa.surgery.given import lora_config
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.patterns import any_of
from lorafa.surgery.walk import PREFIX, places, require_module, uncompiled_name

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on ``model`` without wrapping the model itself, and make it count and train.

    The configs are then at ``model.peft_config``.

    Args:
        state_dict: tensors of an adapter: the layers they are of get one, whatever ``target_modules`` names. No value
            is read: :func:`lorafa.set_peft_model_state_dict` fills the adapter.

    Raises:
        TargetError: ``state_dict`` has no factors of a layer, or of one the model does not have.
        LoraError: as :func:`lorafa.get_peft_model`; nothing is changed then.
    """
    config = lora_config(peft_config)
    activate.require_nothing_merged(require_module(model))
    if state_dict is not None:
        config = _with_targets_of(state_dict, config, model)
    tuner = LoraModel(model)
    tuner.peft_config = getattr(model, "peft_config", {})
    tuner.inject_adapter(config, adapter_name, Options(low_cpu_mem_usage=low_cpu_mem_usage))
    tuner.set_adapter(adapter_name, config.inference_mode)
    model.peft_config = tuner.peft_config  # type: ignore[assignment]
    return model


def _with_targets_of(state_dict: Mapping[str, Tensor], config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config with the layers as targets that the tensors of an adapter belong to, each by its full name."""
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
