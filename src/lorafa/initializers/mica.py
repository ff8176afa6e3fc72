"""MiCA: train A alone, in the directions of the output that W uses least (arXiv:2604.01694)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import require_finite
from lorafa.numerics.linalg import full_svd
from lorafa.spec import LayerSpec


@initializer(
    reads_weight=True,
    trains="A",
    peft_makes_on=frozenset({"linear", "embedding"}),
    stages=Stages(
        objective="zero product", target="W", metric="identity", selection="trailing r on the left",
        split="B = U, A = 0", scale="1", base="kept",
    ),
)  # fmt: skip
def mica(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B is the last r left singular vectors of W and stays as it is; A = 0 is trained.

    Singular values of zero are welcome: their vectors are directions the layer does not use at all.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: W holds inf or nan.
    """
    check_rank(spec, weight)
    require_finite(weight, "its weight")
    A_shape, _ = spec.stored_shapes(weight)
    B = full_svd(weight).U[..., -spec.rank :]
    return InitResult(torch.zeros(A_shape, dtype=B.dtype, device=B.device), B)
