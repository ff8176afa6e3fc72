"""Both factors random, their product taken out of the base: the starts LoRA-GA's scripts call "gaussian" and "kaiming".

The samplers are those of the scripts' mode "simple". :mod:`lorafa.initializers.gaussian` and
:mod:`lorafa.initializers.kaiming` are other starts, of PEFT and of the LoRA paper: there B is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import clipped
from lorafa.settings.checks import check_choice, check_flag, check_number
from lorafa.spec import LayerSpec, Shape

Sampler = Callable[[Shape, float, torch.Generator], Tensor]
"""(shape (..., rows, columns), standard deviation where it is set, random source) -> a factor."""


def _normal(deviation: Callable[[int, int], float]) -> Sampler:
    """Normal numbers whose standard deviation follows from (rows, columns)."""
    return lambda shape, std, generator: torch.empty(shape).normal_(
        0.0, deviation(shape[-2], shape[-1]), generator=generator
    )


def _gaussian(shape: Shape, std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _zeros(shape: Shape, std: float, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _uniform(shape: Shape, std: float, generator: torch.Generator) -> Tensor:
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _orthogonal(shape: Shape, std: float, generator: torch.Generator) -> Tensor:
    """Orthonormal rows or columns, whichever are fewer."""
    tall = torch.empty((*shape[:-2], max(shape[-2:]), min(shape[-2:]))).normal_(generator=generator)
    Q: Tensor = torch.linalg.qr(tall).Q
    return Q if shape[-2] >= shape[-1] else Q.mT.contiguous()


_BOTH: Mapping[str, Sampler] = {
    "gaussian": _gaussian,
    "fan_out_kaiming": _normal(lambda rows, columns: (2 / rows) ** 0.5),
    "xavier": _normal(lambda rows, columns: (2 / (rows + columns)) ** 0.5),
    "zeros": _zeros,
    "unit": _normal(lambda rows, columns: max(rows, columns) ** -0.5),
    "orthogonal": _orthogonal,
}
SAMPLERS_A: Mapping[str, Sampler] = dict(_BOTH, kaiming=_uniform)
SAMPLERS_B: Mapping[str, Sampler] = dict(_BOTH, kaiming=_normal(lambda rows, columns: (2 / columns) ** 0.5))
"""The scripts draw a "kaiming" A from a uniform and a "kaiming" B from a normal distribution."""


@dataclass(frozen=True)
class BothRandomConfig:
    """How A and B are drawn, and how large they are."""

    lora_A: str = "unit"
    """Sampler of A: unit (normal, standard deviation 1 / sqrt of its longer side), kaiming (uniform), fan_out_kaiming,
    xavier, orthogonal, gaussian (lora_A_std) or zeros."""
    lora_B: str = "unit"
    """Sampler of B: the same, but that kaiming is normal, with variance 2 / r."""
    lora_A_std: float = 1.0
    """Standard deviation of a gaussian A."""
    lora_B_std: float = 1.0
    """Standard deviation of a gaussian B."""
    scale: str = "default"
    """default leaves the factors as they are drawn; stable multiplies A with in^(1/4) / sqrt(gamma) and B with
    out^(1/4) / sqrt(gamma)."""
    stable_gamma: float = 16.0
    """gamma of scale stable."""
    norm_clip: bool = False
    """Shrink A and B where an entry of s B A is larger than the largest of the weight."""

    def __post_init__(self) -> None:
        check_choice("lora_A", self.lora_A, SAMPLERS_A)
        check_choice("lora_B", self.lora_B, SAMPLERS_B)
        check_choice("scale", self.scale, ("default", "stable"))
        for name in ("lora_A_std", "lora_B_std", "stable_gamma"):
            check_number(name, getattr(self, name), "a number > 0", 0)
        check_flag("norm_clip", self.norm_clip)
        if self.lora_A == self.lora_B == "zeros":
            raise ConfigError("lora_A and lora_B are both zeros, so neither would get a gradient. Draw one of them.")


@initializer(
    reads_weight=True,
    settings=BothRandomConfig,
    moves_base=True,
    stages=Stages(
        objective="product", target="random", metric="-", selection="-",
        split="both random", scale="by its samplers", base="without s B A",
    ),
)  # fmt: skip
def both_random(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A and B each by its sampler; the base is left without s B A, so that the model starts unchanged."""
    settings: BothRandomConfig = spec.settings or BothRandomConfig()
    A_shape, B_shape = spec.stored_shapes(weight)
    A = SAMPLERS_A[settings.lora_A](A_shape, settings.lora_A_std, spec.generator())
    B = SAMPLERS_B[settings.lora_B](B_shape, settings.lora_B_std, spec.generator("B"))
    if settings.scale == "stable":
        A = A * (A_shape[-1] ** 0.25 / settings.stable_gamma**0.5)
        B = B * (B_shape[-2] ** 0.25 / settings.stable_gamma**0.5)
    result = InitResult(A, B, subtract_from_base=True)
    return clipped(result, weight, spec) if settings.norm_clip else result
