"""The default: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (LoRA, arXiv:2106.09685, with loralib's uniform A)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, LayerSpec, factor_shapes, initializer


@initializer(also=(True,))
def kaiming(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """For an embedding A = 0 and B ~ N(0, 1): a row of A is met only when its token is, B always.

    A frozen A is random there too.
    """
    A_shape, B_shape = factor_shapes(weight, spec.rank)
    if spec.kind == "embedding" and not spec.freeze_A:
        return InitResult(torch.zeros(A_shape), torch.empty(B_shape).normal_(generator=spec.generator()))
    bound = weight.shape[-1] ** -0.5
    A = torch.empty(A_shape).uniform_(-bound, bound, generator=spec.generator())
    return InitResult(A, torch.zeros(B_shape))
