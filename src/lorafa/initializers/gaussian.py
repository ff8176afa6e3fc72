"""``init_lora_weights="gaussian"``: A ~ N(0, 1/r^2), B = 0."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import random_start
from lorafa.spec import LayerSpec


@initializer(
    any_shape=True,
    peft_makes_on=None,
    peft_makes_with=frozenset({"formula"}),
    stages=Stages(
        objective="zero product", target="random A", metric="-", selection="-",
        split="A random, B = 0", scale="standard deviation 1/r", base="kept",
    ),
)  # fmt: skip
def gaussian(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """The standard deviation is 1/r, as in PEFT and diffusers. Embeddings: A = 0, B ~ N(0, 1), but for a frozen A."""
    return random_start(weight, spec, lambda A, generator: A.normal_(0.0, 1 / spec.rank, generator=generator))
