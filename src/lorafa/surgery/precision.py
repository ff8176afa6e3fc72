"""Number formats of a model that is trained in mixed precision: what is frozen in half, what is trained in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lorafa.backends.oddities import is_plain
from lorafa.backends.offload import rests_elsewhere
from lorafa.errors import BackendError, ConfigError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.settings.checks import found
from lorafa.storage.tensors import is_part
from lorafa.surgery.activate import require_nothing_merged
from lorafa.surgery.walk import hosts, lora_layers, require_module

_KNOWN = (torch.float16, torch.bfloat16, torch.float32)
_CAST = (*_KNOWN, torch.float64)
"""Formats of numbers; what is in others, codes of quantized layers for example, stays as it is."""

_SHARDED = "_fsdp_wrapped_module"
"""Where FSDP1 has the module whose parameters it has made flat."""


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to ``dtype``, to save memory, and what is trained to float32, for stable steps.

    PEFT's, but for two things. Codes of quantized layers stay as they are. An adapter of which some factor is trained
    is cast as a whole: its frozen A (``freeze_A``) or start is a part of what is learned, and is not rounded.

    Args:
        model: changed in place; buffers stay as they are, and gradients follow their parameters.
        dtype: ``torch.float16`` or ``torch.bfloat16``; float32 brings a frozen base back to it, without its old digits.

    Raises:
        ConfigError: another dtype.
        AdapterError: an adapter is merged: the weights that come back when it is taken out would be in the old dtype.
        BackendError: weights rest on disk or are spread over processes, so that casting would not reach them.
    """
    if dtype not in _KNOWN:
        raise ConfigError(
            "dtype is that of frozen weights in mixed precision, torch.bfloat16 or torch.float16 (or torch.float32), "
            f"found {found(dtype)}."
        )
    require_module(model)
    require_nothing_merged(model)
    if away := [name for name, module in model.named_modules() if rests_elsewhere(module)]:
        raise BackendError(
            f"Weights of {shorten(away, 3)} rest elsewhere and hooks of accelerate bring in a copy for each call, in "
            "the dtype they rest in. Pass dtype= when the model is loaded. Nothing was cast."
        )
    parts = [name for name, module in model.named_modules() if _SHARDED in module._modules]
    parts += [name for name, parameter in model.named_parameters() if is_part(parameter)]
    if parts:
        named = shorten([name or "the model" for name in parts], 3)
        raise BackendError(
            f"Only parts of {named} are in this process (FSDP, DeepSpeed ZeRO-3), with buffers in their dtype. Cast "
            "the model before it is sharded. Nothing was cast."
        )
    kept = {id(parameter) for parameter in _of_trained_adapters(model)}
    for parameter in model.parameters():
        if is_plain(parameter) and parameter.dtype in _CAST:
            _cast(parameter, torch.float32 if parameter.requires_grad or id(parameter) in kept else dtype)


def _of_trained_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter of an adapter of some layer that has one that is trained."""
    for _, layer in lora_layers(model):
        for name in layer.adapters:
            own = list(_held(layer, name))
            if any(parameter.requires_grad for parameter in own):
                yield from own


def _held(layer: LoraLayer, name: str) -> Iterator[nn.Parameter]:
    """Every parameter that a layer holds of an adapter, those of its start too."""
    for holder in layer.holders():
        if name in holder:
            yield from [holder[name]] if isinstance(holder, nn.ParameterDict) else holder[name].parameters()


def keep_in_float32(model: nn.Module, name: str) -> None:
    """Cast what adapter ``name`` has in a dtype of less digits to float32: factors, starts, extras, rows of tokens."""
    for _, host in hosts(model):
        own = _held(host, name) if isinstance(host, LoraLayer) else _rows(host, name)
        for parameter in own:
            if parameter.is_floating_point() and parameter.element_size() < torch.float32.itemsize:
                _cast(parameter, torch.float32)


def _rows(host: Host, name: str) -> Iterator[nn.Parameter]:
    """What another host has of an adapter; not a copy of a whole module, which runs in the dtype of its inputs."""
    return iter(() if host.trains_whole else host.stored_parameters(name).values())


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if parameter.dtype == dtype:
        return
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    if gradient is not None:
        parameter.grad = gradient.to(dtype)
