"""Updates inside weights, for the length of a forward pass of a module that multiplies with its weights itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorafa.adapter import full_precision
from lorafa.backends.offload import rests_elsewhere
from lorafa.errors import BackendError
from lorafa.layers.base import LoraLayer
from lorafa.layers.own_modules import require_uncalled
from lorafa.numerics.linalg import working_dtype


def updated_tensors(layer: LoraLayer, weight_name: str, bias_name: str | None = None) -> dict[str, Tensor]:
    """Weight (and bias) with the counting updates added, with gradients, under the names a module knows them by."""
    require_in_memory(type(layer).__name__, layer.get_base_layer())
    adapters, base, weight = layer.counting(), layer.get_base_layer(), layer.base_weight()
    for adapter in adapters:
        if not adapter.as_made:
            require_uncalled(layer, adapter, f"a {type(layer).__name__} adds its update to the weight")
    if len(adapters) == 1 and adapters[0].variant.plain:  # no float32 copy of W
        A, B = (factor.to(weight.dtype) for factor in adapters[0].running_factors)
        product = torch.baddbmm if weight.dim() == 3 else torch.addmm
        scaling, running = adapters[0].scaling, layer.backend.weight(base)  # which may be without the start
        with full_precision(weight):
            if isinstance(scaling, Tensor):
                updated = product(running, (B * scaling).to(weight.dtype), A)
            else:
                updated = product(running, B, A, alpha=scaling)
    else:
        updated = weight.to(working_dtype(weight.dtype))
        for adapter in adapters:
            updated = updated + adapter.delta_weight(weight)
    tensors = {weight_name: layer.backend.to_layout(base, updated)}
    bias = None if bias_name is None or layer.backend.bias(base) is None else layer.updated_bias(adapters)
    return tensors if bias is None else tensors | {str(bias_name): bias}


def require_in_memory(name: str, *bases: nn.Module) -> None:
    """Raise BackendError if the base of a layer that adds the update to its weight has its weights elsewhere."""
    if any(map(rests_elsewhere, bases)):
        raise BackendError(
            f"{name}: the weights of this {type(bases[0]).__name__} rest elsewhere, and hooks of accelerate bring them "
            "in for each call, which would undo the update that is added to them. Keep the module in memory "
            "(device_map), or leave it out of the targets."
        )


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``module(*args, **kwargs)`` with other tensors under these names (dotted paths) for the length of the call.

    Under FSDP1 (torch's FullyShardedDataParallel) parameters are ordinary attributes while the module runs, which
    ``functional_call`` does not swap; they are swapped here.
    """
    owners = {key: module.get_submodule(key.rpartition(".")[0]) for key in tensors}
    attributes = [key for key, owner in owners.items() if key.rpartition(".")[2] in owner.__dict__]
    if not attributes:
        return functional_call(module, dict(tensors), args, kwargs)
    held = [(owners[key].__dict__, key.rpartition(".")[2], tensors[key]) for key in attributes]
    was = [own[name] for own, name, _ in held]
    try:
        for own, name, tensor in held:
            own[name] = tensor
        others = {key: tensor for key, tensor in tensors.items() if key not in attributes}
        return functional_call(module, others, args, kwargs)
    finally:
        for (own, name, _), tensor in zip(held, was, strict=True):
            own[name] = tensor
