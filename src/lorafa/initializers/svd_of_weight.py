"""The r leading triplets of W at four scales: the start that LoRA-GA's scripts call "svd".

With scale "default" it is PiSSA (:mod:`lorafa.initializers.pissa`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import clipped, halves, leading
from lorafa.numerics.linalg import SVD
from lorafa.settings.checks import check_choice, check_flag, check_number
from lorafa.spec import LayerSpec


@dataclass(frozen=True)
class SvdOfWeightConfig:
    """How large A and B are along the singular vectors."""

    scale: str = "default"
    """default: both have sqrt(sigma_i / s), as in PiSSA; unit: 1; stable: A in^(1/4) / sqrt(gamma), B out^(1/4) /
    sqrt(gamma); normalized: both sqrt(r sigma_i / (sigma_1 + ... + sigma_r))."""
    stable_gamma: float = 16.0
    """gamma of scale stable."""
    norm_clip: bool = False
    """Shrink A and B where an entry of s B A is larger than the largest of the weight."""

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("default", "stable", "unit", "normalized"))
        check_number("stable_gamma", self.stable_gamma, "a number > 0", 0)
        check_flag("norm_clip", self.norm_clip)


@initializer(
    reads_weight=True,
    settings=SvdOfWeightConfig,
    moves_base=True,
    stages=Stages(
        objective="product", target="W", metric="identity", selection="leading r",
        split="sqrt, sqrt, or unit vectors", scale="1/s, or one of three", base="without s B A",
    ),
)  # fmt: skip
def svd_of_weight(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A along the right and B along the left singular vectors; the base is left without s B A.

    Raises:
        ConfigError: the weight has fewer than r singular values.
        DegenerateError: fewer than r differ from zero.
    """
    settings: SvdOfWeightConfig = spec.settings or SvdOfWeightConfig()
    A, B = _scaled(leading(weight, spec, "its weight"), settings, spec)
    result = InitResult(A, B, subtract_from_base=True)
    return clipped(result, weight, spec) if settings.norm_clip else result


def _scaled(triplets: SVD, settings: SvdOfWeightConfig, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    A, B = triplets.Vh, triplets.U
    if settings.scale == "default":
        return halves(triplets, 1 / spec.scaling)
    if settings.scale == "normalized":
        return halves(triplets, (spec.rank / triplets.S.sum(-1))[..., None])
    if settings.scale == "stable":
        root = settings.stable_gamma**0.5
        return A * (A.shape[-1] ** 0.25 / root), B * (B.shape[-2] ** 0.25 / root)
    return A, B
