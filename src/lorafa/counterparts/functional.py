"""What transformers and diffusers call on a model that carries adapters without being wrapped (``peft.functional``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.counterparts.layers import BaseTunerLayer
from lorafa.counterparts.weight_conversion import on_stacks
from lorafa.surgery import activate, inject, precision
from lorafa.surgery.given import lora_config
from lorafa.surgery.walk import hosts, require_module


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = BaseTunerLayer
) -> None:
    """Make exactly these adapters count and, unless ``inference_mode``, train.

    Args:
        layer_cls: PEFT's choice among methods; here all layers are of one.

    Raises:
        AdapterError: an unknown name, or adapters are merged; nothing was changed.
    """
    activate.set_adapter(require_module(model), adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: Any = BaseTunerLayer
) -> list[str] | None:
    """Take an adapter off every layer; if it was the only one that counted, another one (if any) counts after it.

    The config at ``model.peft_config`` stays, as in PEFT: who calls this takes it away.

    Args:
        prefix, layer_cls: PEFT's choice among methods; here all layers are of one.

    Returns:
        The adapters that count now; None where no layer has an adapter.

    Raises:
        AdapterError: an unknown name, or it is merged; nothing was changed.
    """
    found = [host for _, host in hosts(require_module(model))]
    left = [name for name in dict.fromkeys(n for host in found for n in host.held()) if name != adapter_name]
    counting = {name for host in found for name in host.active_adapters}
    successor = left[0] if left and counting <= {adapter_name} else None
    activate.delete_adapter(model, adapter_name, successor)
    return found[0].active_adapters if found else None


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """:func:`lorafa.inject_adapter_in_model`, with a config of transformers 4 brought to the model as it is now.

    transformers' own ``load_adapter`` counts on that: it converts the tensors by itself.

    Raises:
        LoraError: as there.
    """
    config = on_stacks(lora_config(peft_config), require_module(model))
    return inject.inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Cast what an adapter has in a dtype of less digits to float32, its start and its rows of tokens included.

    Parameters stay the objects they are, so that an optimizer goes on with them.

    Raises:
        AdapterError: there is no such adapter.
    """
    activate.require_adapters(require_module(model), [adapter_name])
    if autocast_adapter_dtype:
        precision.keep_in_float32(model, adapter_name)
