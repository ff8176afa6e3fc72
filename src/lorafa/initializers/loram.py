"""A control for starts from singular vectors: directions at random, of the size of LoRA-One's step.

LoRAM (arXiv:2507.06558) claims that what such starts gain is the size of the update, and not its direction. What a
start gains over this one, at the same gamma, is its directions' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import check_gamma, known_gamma
from lorafa.spec import LayerSpec


@dataclass
class LoramConfig:
    """How large the update is."""

    stable_gamma: float | str = 128.0
    """The largest singular value of s B A is s / gamma, as LoRA-One's is. "auto" picks it by the loss on held-out rows,
    which :func:`lorafa.initialize` does."""

    def __post_init__(self) -> None:
        check_gamma(self.stable_gamma)


_STAGES = Stages(
    objective="product", target="random", metric="identity", selection="r random directions",
    split="orthonormal, orthonormal", scale="1/gamma", base="kept",
)  # fmt: skip


@initializer(settings=LoramConfig, keeps_function=False, stages=_STAGES)
def loram(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A with r orthonormal rows and B with r orthonormal columns, both at random, each over the root of gamma.

    Every singular value of s B A is s / gamma; the sign of each pair is as random as its directions. The base stays,
    as with LoRA-One's start.

    Raises:
        ConfigError: r > min(out, in), or gamma is still "auto".
    """
    check_rank(spec, weight)
    settings: LoramConfig = spec.settings or LoramConfig()
    gamma = known_gamma(settings.stable_gamma, "128 is LoRA-One's")
    (*experts, _, in_), (*_, out, _) = spec.stored_shapes(weight)
    generator = spec.generator()

    def drawn(size: int) -> Tensor:
        gaussian = torch.empty(*experts, size, spec.rank, dtype=torch.float64).normal_(generator=generator)
        Q: Tensor = torch.linalg.qr(gaussian).Q
        return Q / math.sqrt(gamma)

    A, B = drawn(in_).mT, drawn(out)
    signs = torch.empty(*experts, 1, spec.rank, dtype=torch.float64).bernoulli_(0.5, generator=generator) * 2 - 1
    return InitResult(A, B * signs)


@initializer(settings=LoramConfig, moves_base=True, stages=replace(_STAGES, base="without s B A"))
def loram_subtracted(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """:func:`loram` with s B A taken out of the base, beside starts that do so: the model starts as it is."""
    return replace(loram(weight, stats, spec), subtract_from_base=True)
