"""KaSA: W loses its r smallest singular triplets, and a diagonal stands between A and B (arXiv:2412.06071)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer, lower_the_rank
from lorafa.initializers.kaiming import kaiming
from lorafa.initializers.stages import halves, require_finite
from lorafa.numerics.linalg import full_svd
from lorafa.spec import LayerSpec


@initializer(
    reads_weight=True,
    moves_base=True,
    keeps_function=False,
    variant="kasa",
    settings="kasa_config",
    asked_by_settings=True,
    stages=Stages(
        objective="zero product", target="random A", metric="-", selection="-",
        split="A random, B = 0, a random diagonal between them", scale="as kaiming",
        base="loses its r smallest triplets",
    ),
)  # fmt: skip
def kasa(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A and B = 0 as by default, d ~ N(0, 1); the base counts as [W]_{k - r} with k = min(out, in).

    Singular values of zero are welcome: nothing is lost with them.

    Raises:
        ConfigError: r >= k, so that nothing is left of W.
        DegenerateError: W holds inf or nan.
    """
    values = min(weight.shape)
    if spec.rank >= values:
        raise ConfigError(
            f"{spec.name}: KaSA drops the r = {spec.rank} smallest singular values of a weight {tuple(weight.shape)}, "
            f"which has {values}. {lower_the_rank(f' below {values}')}"
        )
    require_finite(weight, "its weight")
    dropped = full_svd(weight).at(slice(-spec.rank, None))
    diagonal = torch.randn(spec.rank, generator=spec.generator("diagonal"))
    return replace(kaiming(weight, stats, spec), taken=halves(dropped, 1 / spec.scaling), extras={"diagonal": diagonal})
