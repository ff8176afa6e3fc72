"""A base layer with updates summed into its weight: in float32, rounded once, checked. The given layer stays as it is.

The functions are methods of :class:`lorafa.layers.base.LoraLayer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, bias_change
from lorafa.backends.base import Backend, is_finite
from lorafa.backends.oddities import described
from lorafa.backends.offload import in_memory, value_of
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.blocks import sum_in_blocks
from lorafa.numerics.linalg import working_dtype


class Merging(Protocol):
    """What merging asks of a layer with adapters."""

    adapters: dict[str, Adapter]

    @property
    def backend(self) -> Backend: ...

    @property
    def pristine(self) -> nn.Module: ...

    def get_base_layer(self) -> nn.Module: ...

    def base_weight(self) -> Tensor: ...


@torch.no_grad()
def merged_base(layer: Merging, names: Sequence[str]) -> nn.Module:
    """A new base layer with the updates of ``names`` in its weight: summed in float32, rounded once."""
    require_mergeable(layer)  # before its weight is read: what is drawn anew is another weight each time
    adapters, weight = [layer.adapters[name] for name in names], layer.base_weight()
    total = None if layer.backend.quantized else sum_in_blocks(weight, adapters)
    if total is not None:
        return _with_total(layer, total, names, updated_bias(layer, adapters))
    changes = (adapter.delta_weight(weight) for adapter in adapters)
    return with_changes(layer, changes, names, updated_bias(layer, adapters))


@torch.no_grad()
def merged_weight(layer: Merging, names: Sequence[str]) -> Tensor:
    """The pristine weight with the updates of ``names``, (out, in), in float32 or wider, not rounded to anything.

    Raises:
        BackendError: the weight is not the one that the layer computes with.
    """
    require_mergeable(layer)
    weight = layer.base_weight()
    total = weight.to(working_dtype(weight.dtype))
    for name in names:
        total = total + layer.adapters[name].delta_weight(weight)
    return total


def with_changes(
    layer: Merging, changes: Iterable[Tensor], names: Sequence[str], bias: Tensor | None = None
) -> nn.Module:
    """A new base layer of the pristine weight plus ``changes`` (out, in): summed in float32, rounded once.

    Raises:
        AdapterError: it would not be finite; ``names`` are the adapters the changes come from.
        BackendError: the layer cannot hold it.
    """
    require_mergeable(layer)
    weight = layer.base_weight()
    total = weight.to(working_dtype(weight.dtype))
    for change in changes:
        if total is weight or change.dtype != total.dtype:
            total = total + change
        else:
            total += change  # a copy by now; the same sum, without a third matrix of this size
        del change  # before the next one is made
    return _with_total(layer, total, names, bias)


def _with_total(layer: Merging, total: Tensor, names: Sequence[str], bias: Tensor | None) -> nn.Module:
    changed = layer.backend.with_weight(layer.pristine, total, bias)
    if layer.backend.quantized:  # codes are no numbers, and scales may be in no tensor of the layer's own
        numbers = (layer.backend.weight(in_memory(changed)), value_of(changed, layer.backend.bias(changed)))
        finite = all(bool(one.isfinite().all()) for one in numbers if one is not None)
    else:
        finite = is_finite(changed, layer.get_base_layer())
    if not finite:
        raise AdapterError(
            f"Merging {', '.join(map(repr, names))} gives inf or nan in a {type(changed).__name__} once rounded to "
            "its dtype; nothing was merged. The adapter was probably trained to divergence, or the model needs a "
            "dtype of wider range: bfloat16 or float32."
        )
    return changed


def require_mergeable(layer: Merging) -> None:
    """Raises BackendError where another weight in the base layer would not change its output as an adapter does."""
    odd = layer.backend.merges(layer.pristine)
    if odd is not None:
        raise BackendError(
            f"Nothing can be merged into this {described(layer.pristine)}: {odd}, so another weight in it would not "
            "change its output as the adapter does; nothing was changed. Keep the adapter unmerged, or remove what "
            "is odd (hook, parametrization, replaced forward) first."
        )


def updated_bias(layer: Merging, adapters: Sequence[Adapter]) -> Tensor | None:
    """The base's bias plus those of the adapters; None where none of these has one.

    Raises:
        BackendError: the base has no bias that could take theirs.
    """
    change, bias = bias_change(adapters), value_of(layer.pristine, layer.backend.bias(layer.pristine))
    if change is None:
        return None
    if bias is None:
        raise BackendError(
            f"lora_bias cannot be merged into a {type(layer.pristine).__name__} without a bias; nothing was merged. "
            "Keep the adapter unmerged, or train one with lora_bias=False."
        )
    return (bias.to(change.dtype) + change).to(bias.dtype)
