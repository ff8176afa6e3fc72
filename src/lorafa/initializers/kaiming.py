"""The default: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (LoRA, arXiv:2106.09685, with loralib's uniform A).

Where A is stored with fewer columns, ``in`` is their number.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import random_start
from lorafa.spec import LayerSpec


@initializer(
    any_shape=True,
    peft_makes_on=None,
    peft_makes_with=frozenset({"formula", "lora_bias"}),
    stages=Stages(
        objective="zero product", target="random A", metric="-", selection="-",
        split="A random, B = 0", scale="uniform within 1/sqrt(in)", base="kept",
    ),
)  # fmt: skip
def kaiming(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """Embeddings: A = 0, B ~ N(0, 1), but for a frozen A."""
    bound = spec.stored_shapes(weight)[0][-1] ** -0.5
    return random_start(weight, spec, lambda A, generator: A.uniform_(-bound, bound, generator=generator))
