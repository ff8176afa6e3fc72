"""Updates inside weights: for the length of a forward pass, or merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafa.adapter import full_precision
from lorafa.backends.base import is_finite
from lorafa.backends.offload import rests_elsewhere, value_of
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.own_modules import require_uncalled
from lorafa.linalg import working_dtype

if TYPE_CHECKING:
    from lorafa.adapter import Adapter
    from lorafa.layers.base import LoraLayer


def updated_tensors(layer: LoraLayer, weight_name: str, bias_name: str | None = None) -> dict[str, Tensor]:
    """Weight (and bias) with the counting updates added, with gradients, under the names a module knows them by."""
    require_in_memory(type(layer).__name__, layer.get_base_layer())
    adapters, base, weight = layer.counting(), layer.get_base_layer(), layer.base_weight()
    for adapter in adapters:
        if not adapter.as_made:
            require_uncalled(layer, adapter)
    if len(adapters) == 1 and adapters[0].variant.plain:  # no float32 copy of W
        A, B = (factor.to(weight.dtype) for factor in adapters[0].factors)
        product = torch.baddbmm if weight.dim() == 3 else torch.addmm
        with full_precision(weight):
            updated = product(weight, B, A, alpha=adapters[0].scaling)
    else:
        updated = weight.to(working_dtype(weight.dtype))
        for adapter in adapters:
            updated = updated + adapter.delta_weight(weight)
    tensors = {weight_name: layer.backend.to_layout(base, updated)}
    bias = None if bias_name is None or layer.backend.bias(base) is None else updated_bias(layer, adapters)
    return tensors if bias is None else tensors | {str(bias_name): bias}


def require_in_memory(name: str, *bases: nn.Module) -> None:
    """Raise BackendError if the base of a layer that adds the update to its weight has its weights elsewhere."""
    if any(map(rests_elsewhere, bases)):
        raise BackendError(
            f"{name}: the weights of this {type(bases[0]).__name__} rest elsewhere, and hooks of accelerate bring them "
            "in for each call, which would undo the update that is added to them. Keep the module in memory "
            "(device_map), or leave it out of the targets."
        )


def updated_bias(layer: LoraLayer, adapters: Sequence[Adapter]) -> Tensor | None:
    """The base's bias plus those of the adapters; None where none of these has one.

    Raises:
        BackendError: the base has no bias that could take theirs.
    """
    changes = [adapter.scaling * adapter.bias for adapter in adapters if adapter.bias is not None]
    if not changes:
        return None
    change, bias = torch.stack(changes).sum(0), value_of(layer.pristine, layer.backend.bias(layer.pristine))
    if bias is None:
        raise BackendError(
            f"lora_bias cannot be merged into a {type(layer.pristine).__name__} without a bias; nothing was merged. "
            "Keep the adapter unmerged, or train one with lora_bias=False."
        )
    return (bias.to(change.dtype) + change).to(bias.dtype)


def with_changes(
    layer: LoraLayer, changes: Iterable[Tensor], names: Sequence[str], bias: Tensor | None = None
) -> nn.Module:
    """A new base layer of the pristine weight plus ``changes`` (out, in): summed in float32, rounded once.

    Raises:
        AdapterError: it would not be finite; ``names`` are the adapters the changes come from.
        BackendError: the layer cannot hold it.
    """
    weight = layer.base_weight()
    total = weight.to(working_dtype(weight.dtype))
    for change in changes:
        total = total + change
    changed = layer.backend.with_weight(layer.pristine, total, bias)
    require_finite(changed, layer.get_base_layer(), names)
    return changed


def require_finite(merged: nn.Module, base: nn.Module, names: Sequence[str]) -> None:
    """Raises AdapterError if merging ``names`` into ``base`` has given inf or nan in the dtype of the layer."""
    if not is_finite(merged, base):
        raise AdapterError(
            f"Merging {', '.join(map(repr, names))} gives inf or nan in a {type(merged).__name__} once rounded to "
            "its dtype; nothing was merged. The adapter was probably trained to divergence, or the model needs a "
            "dtype of wider range: bfloat16 or float32."
        )
