"""LoRA-GA: A and B from singular vectors of the first gradient (Wang et al. 2024, arXiv:2407.05000).

For disjoint index sets the first update of both factors together is the best rank-2r step (theorem 3.1):
B B^T G + G A^T A = [G]_2r where A and B have unit rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorafa.calibration.gradient import gradient_triplets
from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer, lower_the_rank
from lorafa.initializers.stages import mean_root_of_weight, require_triplets
from lorafa.numerics.linalg import SVD, leading_svd
from lorafa.settings.methods import LoraGAConfig
from lorafa.spec import LayerSpec

STAGES = Stages(
    objective="first update", target="G", metric="identity", selection="r of the leading 2r for A, the other r for B",
    split="unit vectors", scale="out^(1/2) / gamma", base="without s B A",
)  # fmt: skip


@initializer(
    needs=("gradient",),
    reads_weight=True,
    settings="lora_ga_config",
    moves_base=True,
    per_rank=2,
    stages=STAGES,
)
def lora_ga(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A has the right and B the left singular vectors of two disjoint halves of the first 2 r triplets.

    Settings: :class:`~lorafa.LoraGAConfig`. ``scale`` multiplies both factors alike: "stable" with m^(1/4) /
    sqrt(gamma) for m outputs (section 3.3), "gd_scale" with 1 / s, "unit" with 1, "weight_svd" with the mean of
    sqrt(sigma_i(W) / s) over the r leading singular values.

    Raises:
        ConfigError: 2 r > min(out, in), so there are no two halves.
        DegenerateError: the gradient has fewer than 2 r singular values other than zero.
    """
    settings: LoraGAConfig = spec.settings or LoraGAConfig()
    triplets = _first_2r(weight, stats, spec)
    index_A, index_B = halves_of_2r(settings.direction, spec)
    factor = _scale(settings, weight, spec)
    A, B = triplets.at(index_A).Vh, triplets.at(index_B).U
    return InitResult(factor * A, factor * B, subtract_from_base=True)


@initializer(
    needs=("gradient",),
    reads_weight=True,
    settings="lora_ga_config",
    moves_base=True,
    per_rank=2,
    stages=replace(STAGES, split="A unit vectors, B carries S", scale="out^(1/4) / sqrt(gamma)"),
)
def lora_ga_peft(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """LoRA-GA as PEFT 0.21 has it, for numbers to compare with: B carries the singular values and the whole scale.

    B = U diag(sigma); "stable" and "weight_svd" (sigma_1(W) / sigma of B's first direction) multiply B alone; "random"
    draws one index set for both factors, so that the theorem of the paper no longer holds.
    """
    settings: LoraGAConfig = spec.settings or LoraGAConfig()
    triplets, rank = _first_2r(weight, stats, spec), spec.rank
    if settings.direction == "random":
        index_A = index_B = torch.randperm(2 * rank, generator=spec.generator())[:rank]
    else:
        index_A, index_B = halves_of_2r(settings.direction, spec)
    left = triplets.at(index_B)
    A, B = triplets.at(index_A).Vh, left.U * left.S
    if settings.scale == "stable":
        B = B * _stable(settings, weight)
    elif settings.scale == "weight_svd":
        B = B * leading_svd(weight, 1, spec.generator()).S / left.S[:1]
    elif settings.scale == "gd_scale":
        A, B = A / spec.scaling, B / spec.scaling
    return InitResult(A, B, subtract_from_base=True)


def _first_2r(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> SVD:
    if 2 * spec.rank > min(weight.shape):
        raise ConfigError(
            f"{spec.name}: LoRA-GA takes 2 r = {2 * spec.rank} singular vectors, and a weight {tuple(weight.shape)} "
            f"has {min(weight.shape)}. {lower_the_rank(f' to {min(weight.shape) // 2}')}"
        )
    return require_triplets(gradient_triplets(stats), 2 * spec.rank, weight, spec, "its gradient")


def halves_of_2r(direction: str, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Which of the first 2 r triplets A and B take: two disjoint sets of r."""
    rank = spec.rank
    everything = torch.arange(2 * rank)
    if direction == "ArBr":
        return everything[1::2], everything[0::2]
    if direction == "random":
        everything = torch.randperm(2 * rank, generator=spec.generator())
    first, second = everything[:rank], everything[rank:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _stable(settings: LoraGAConfig, weight: Tensor) -> float:
    """m^(1/4) / sqrt(gamma) for m outputs."""
    return float(weight.shape[-2] ** 0.25 / settings.stable_gamma**0.5)


def _scale(settings: LoraGAConfig, weight: Tensor, spec: LayerSpec) -> float:
    if settings.scale == "stable":
        return _stable(settings, weight)
    if settings.scale == "gd_scale":
        return 1 / spec.scaling
    if settings.scale == "weight_svd":
        return mean_root_of_weight(weight, spec)
    return 1.0
