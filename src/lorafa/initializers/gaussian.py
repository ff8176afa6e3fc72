"""``init_lora_weights="gaussian"``: A ~ N(0, 1/r^2), B = 0."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.initializers.base import InitResult, initializer
from lorafa.initializers.stages import random_start
from lorafa.spec import LayerSpec


@initializer(any_shape=True, peft_makes_on=None, peft_makes_with=frozenset({"formula"}))
def gaussian(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """The standard deviation is 1/r, as in PEFT and diffusers. Embeddings: A = 0, B ~ N(0, 1), but for a frozen A."""
    return random_start(weight, spec, lambda A, generator: A.normal_(0.0, 1 / spec.rank, generator=generator))
