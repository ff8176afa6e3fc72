"""GoRA: ranks by importance, a random A, and the B that fits the gradient best (He et al. 2025, arXiv:2502.12171)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import DegenerateError, InitResult, Stages, initializer, lower_the_rank
from lorafa.initializers.kaiming import kaiming
from lorafa.initializers.stages import whole_gradient
from lorafa.numerics.linalg import gram_cholesky, spd_inverse
from lorafa.settings.checks import check_flag, check_number
from lorafa.spec import LayerSpec


@dataclass
class GoraConfig:
    """How large the first step is, and whether ranks are shared out."""

    step: float = 0.05
    """s B A is about this much of the gradient's norm (gamma in the paper, 5e-2 in the authors' code)."""
    share_ranks: bool = True
    """Whether :func:`lorafa.initialize` gives every layer a rank by its mean |W o G|, from r / 2 to 4 r, as the method
    has it (:func:`own_ranks`); False keeps the config's."""

    def __post_init__(self) -> None:
        check_number("step", self.step, "a number > 0", 0)
        check_flag("share_ranks", self.share_ranks)


def own_ranks(settings: GoraConfig, r: int) -> dict[str, Any] | None:
    """By importance, from r / 2 to 4 r, unless ``share_ranks`` is off."""
    return {"rule": "importance", "r_min": max(r // 2, 1), "r_max": 4 * r} if settings.share_ranks else None


@initializer(
    needs=("gradient",),
    settings=GoraConfig,
    own_ranks=own_ranks,
    own_scaling=True,
    keeps_function=False,
    whole_gradients=True,
    stages=Stages(
        objective="product", target="-G", metric="identity", selection="rows of a random A",
        split="A random, B = least squares", scale="step sqrt(in/r) / s", base="kept",
    ),
)  # fmt: skip
def gora(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A as by default, B = -(step / s) sqrt(in / r) G A^+, so that s B A = -step sqrt(in / r) G P_A.

    P_A projects on the rows of A, and a random one keeps about r / in of a gradient's energy: hence the root. Whole
    gradients are collected, out x in numbers of float32 for every layer at once.

    The method's scaling is alpha / sqrt(r) with the layer's own r: set ``use_rslora``.

    Raises:
        ConfigError: r > in: the rows of A are dependent, and A A^T has no inverse.
        CalibrationError: the statistics hold a sketch of the gradient, collected for another start.
        DegenerateError: the gradient is zero or not finite.
    """
    if spec.rank > weight.shape[-1]:
        raise ConfigError(
            f"{spec.name}: GoRA fits B by the {spec.rank} rows of A, of which only {weight.shape[-1]} can be "
            f"independent on a weight {tuple(weight.shape)}. {lower_the_rank(f' to {weight.shape[-1]}')}"
        )
    settings: GoraConfig = spec.settings or GoraConfig()
    G = whole_gradient(stats, spec, "GoRA fits B to all entries")
    if not G.any():
        raise DegenerateError("its gradient is zero")
    A = kaiming(weight, {}, spec).A.to(G)
    L, _ = gram_cholesky(A)
    least_squares = G.double() @ A.mT.double() @ spd_inverse(L)
    size = settings.step / spec.scaling * (A.shape[-1] / spec.rank) ** 0.5
    return InitResult(A, (-size * least_squares).to(G.dtype))
