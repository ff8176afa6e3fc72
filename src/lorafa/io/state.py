"""State dicts of single adapters in memory, by PEFT's functions and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends.offload import device_of
from lorafa.errors import AdapterError
from lorafa.io.peft_format import (
    PREFIX,
    file_tensors,
    has_start,
    keeps_embeddings,
    load_tensors,
    misfit,
    without_prefix,
)
from lorafa.surgery.adapters import require_adapters, require_unmerged
from lorafa.surgery.walk import lora_layers, user_model


def _parts(model: nn.Module) -> tuple[nn.Module, dict[str, Any], str]:
    """The user's model, its configs, and the prefix its keys have in a file."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(
            f"This {type(model).__name__} carries no adapter of lorafa. Call get_peft_model or inject_adapter_in_model."
        )
    inner = user_model(model)
    return inner, configs, "" if inner is model else PREFIX


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under the names they have in a file, the adapter's name taken out.

    Args:
        model: a PeftModel, or a model with injected adapters (then the keys have no prefix).
        state_dict: take the values from here, under the model's live names.
        unwrap_compiled: the model is a torch.compile wrapper: look inside it.

    Raises:
        AdapterError: no such adapter.
        CheckpointError: ``state_dict`` lacks a tensor of the adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    inner, configs, prefix = _parts(model)
    require_adapters(inner, [adapter_name])
    config = configs[adapter_name]
    embeddings = keeps_embeddings(config, inner, save_embedding_layers)
    tensors = file_tensors(inner, adapter_name, config, state_dict=state_dict, embeddings=embeddings)
    return {prefix + key: value for key, value in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fill one adapter from tensors named as :func:`get_peft_model_state_dict` names them.

    Args:
        ignore_mismatched_sizes: leave tensors of another shape as they are in the model.
        low_cpu_mem_usage: PEFT's; an adapter made on the meta device gets its memory here in any case.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, both empty.

    Raises:
        AdapterError: no such adapter, or it is merged.
        CheckpointError: the tensors do not fit; nothing was changed.
    """
    inner, configs, _ = _parts(model)
    require_adapters(inner, [adapter_name])
    require_unmerged(inner, adapter_name, "loading other values into it")
    tensors = without_prefix(peft_model_state_dict)
    config, with_start = configs[adapter_name], has_start(inner, adapter_name)
    found = misfit(inner, adapter_name, config, tensors, with_start=with_start)
    if ignore_mismatched_sizes and found.misshapen:
        tensors = {key: value for key, value in tensors.items() if key not in found.misshapen}
        own = file_tensors(inner, adapter_name, config)
        tensors |= {key: own[key] for key in found.misshapen}
        found = misfit(inner, adapter_name, config, tensors, with_start=with_start)
    found.raise_if_any("The state dict", adapter_name)
    materialize(inner, adapter_name)
    load_tensors(inner, adapter_name, config, tensors, with_start=with_start)
    return torch.nn.modules.module._IncompatibleKeys([], [])


def materialize(model: nn.Module, name: str) -> None:
    """Give an adapter that was made on the meta device memory on the device of its layer; its values are undefined."""
    for _, layer in lora_layers(model):
        if name not in layer.adapters or not layer.adapters[name].A.is_meta:
            continue
        device = device_of(layer.get_base_layer())
        for holder in layer.holders():
            if name not in holder:
                continue
            if isinstance(holder, nn.ModuleDict):
                holder[name].to_empty(device=device)
            else:
                trains = holder[name].requires_grad
                holder[name] = nn.Parameter(torch.empty_like(holder[name], device=device), requires_grad=trains)
