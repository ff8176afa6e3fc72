"""An adapter on a model that is not wrapped: the user keeps the model, and its layers carry the adapter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.surgery import activate
from lorafa.surgery.build import Options
from lorafa.surgery.given import lora_config
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.targets_of_tensors import with_targets_of
from lorafa.surgery.walk import require_module


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
        config = with_targets_of(state_dict, config, model)
    tuner = LoraModel(model)
    tuner.peft_config = getattr(model, "peft_config", {})
    tuner.put_on(config, adapter_name, Options(low_cpu_mem_usage=low_cpu_mem_usage))
    tuner.set_adapter(adapter_name, config.inference_mode)
    model.peft_config = tuner.peft_config  # type: ignore[assignment]
    return model
