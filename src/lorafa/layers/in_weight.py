"""For layers that add their update to the weight for the length of a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafa.adapter import full_precision, working_dtype

if TYPE_CHECKING:
    from lorafa.layers.base import LoraLayer


def updated_tensors(layer: LoraLayer, weight_name: str, bias_name: str | None = None) -> dict[str, Tensor]:
    """Weight (and bias) with the counting updates added, with gradients, under the names a module knows them by."""
    adapters, base, weight = layer.counting(), layer.get_base_layer(), layer.base_weight()
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
    change, bias = layer.bias_change(adapters), layer.backend.bias(base)
    if bias_name is not None and change is not None and bias is not None:
        tensors[bias_name] = (bias.to(change.dtype) + change).to(bias.dtype)
    return tensors
