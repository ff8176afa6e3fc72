"""``init_lora_weights="gaussian"``: A ~ N(0, 1/r^2), B = 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, LayerSpec, factor_shapes, initializer


@initializer()
def gaussian(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """The standard deviation is 1/r, as in PEFT and diffusers. Embeddings: A = 0, B ~ N(0, 1), but for a frozen A."""
    A_shape, B_shape = factor_shapes(weight, spec.rank)
    if spec.kind == "embedding" and not spec.freeze_A:
        return InitResult(torch.zeros(A_shape), torch.empty(B_shape).normal_(generator=spec.generator()))
    A = torch.empty(A_shape).normal_(0.0, 1 / spec.rank, generator=spec.generator())
    return InitResult(A, torch.zeros(B_shape))
