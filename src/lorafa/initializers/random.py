"""``init_lora_weights=False``: both factors random, so that step 0 is not the base model. For tests and debugging."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.spec import LayerSpec


@initializer(
    keeps_function=False,
    any_shape=True,
    peft_makes_on=None,
    peft_makes_with=frozenset({"formula", "lora_bias"}),
    stages=Stages(
        objective="product", target="random", metric="-", selection="-",
        split="both random", scale="uniform within 1/sqrt(in), 1/sqrt(r)", base="kept, so that the function changes",
    ),
)  # fmt: skip
def random(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B ~ U(-1/sqrt(r), 1/sqrt(r)); embeddings: both N(0, 1)."""
    A_shape, B_shape = spec.stored_shapes(weight)
    generator = spec.generator()
    if spec.is_table:
        A = torch.empty(A_shape).normal_(generator=generator)
        return InitResult(A, torch.empty(B_shape).normal_(generator=generator))
    bounds = A_shape[-1] ** -0.5, B_shape[-1] ** -0.5
    A, B = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip((A_shape, B_shape), bounds, strict=True)
    )
    return InitResult(A, B)
