"""MiLoRA: A and B are the r smallest singular triplets of W (Wang et al. 2024, arXiv:2406.09044, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import taken_from_base, trailing
from lorafa.spec import LayerSpec


@initializer(
    reads_weight=True,
    moves_base=True,
    stages=Stages(
        objective="product", target="W", metric="identity", selection="trailing r",
        split="sqrt, sqrt", scale="1/s", base="without s B A",
    ),
)  # fmt: skip
def milora(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B = U_-r sqrt(S_-r / s), A = sqrt(S_-r / s) V_-r^T: W - s B A is the best approximation of W of rank min - r.

    Decomposes the whole weight: methods that are faster find the largest triplets.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: some of the r smallest singular values are zero.
    """
    return taken_from_base(trailing(weight, spec, "its weight"), spec.scaling)
