"""EVA: A is the r principal directions of a layer's inputs (Paischer et al. 2024, arXiv:2410.07170, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import require_triplets
from lorafa.numerics.linalg import SVD, float_matrix
from lorafa.settings.methods import EvaConfig
from lorafa.spec import LayerSpec


def own_ranks(settings: EvaConfig, r: int) -> dict[str, Any] | None:
    """By explained variance (section 3.3 of the paper), unless ``rho`` is 1."""
    return {"rule": "explained_variance", "rho": settings.rho} if settings.rho > 1 else None


@initializer(
    needs=("principal",),
    settings="eva_config",
    own_ranks=own_ranks,
    waits=True,
    peft_makes_on=frozenset({"linear", "embedding"}),
    stages=Stages(
        objective="zero product", target="inputs X, centred", metric="identity", selection="leading r on the right",
        split="A = V^T, B = 0", scale="1", base="kept",
    ),
)  # fmt: skip
def eva(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A = V_r^T, orthonormal rows, and B = 0; with ``whiten`` row i is divided by sqrt(sigma_i), as in PEFT.

    That is not whitening: of the T inputs gone over, the projections have the variances sigma_i^2 / T before and
    sigma_i / T after, not 1.

    Raises:
        ConfigError: r > min(out, in).
        CalibrationError: the statistics hold fewer than r directions.
        DegenerateError: the inputs are not finite, or have fewer than r directions.
    """
    settings: EvaConfig = spec.settings or EvaConfig()
    V = float_matrix(stats["principal.components"])
    inputs = SVD(V.mT, stats["principal.singular_values"], V)
    found = require_triplets(inputs, spec.rank, weight, spec, "its input")
    A = directions_as_A(found.Vh, found.S, settings)
    return InitResult(A, A.new_zeros(weight.shape[0], spec.rank))


def directions_as_A(V: Tensor, S: Tensor, settings: EvaConfig) -> Tensor:
    """A (r, in) of principal directions (r, in) and their singular values (r,); zero where there is no direction,
    sigma_i = 0."""
    A = V / S.sqrt()[:, None] if settings.whiten else V
    return torch.where(S[:, None] > 0, A, 0.0)
