"""PiSSA: A and B are the r largest singular triplets of W (Meng et al. 2024, arXiv:2404.02948, equations 2-4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import leading, taken_from_base
from lorafa.settings.checks import check_flag
from lorafa.spec import LayerSpec


@dataclass(frozen=True)
class PissaConfig:
    """How the triplets are found."""

    exact: bool = False
    """Decompose the whole weight: five times slower, for the last 0.01 % of what the triplets hold."""

    def __post_init__(self) -> None:
        check_flag("exact", self.exact)


@initializer(
    reads_weight=True,
    also=("pissa_niter_N",),
    settings=PissaConfig,
    moves_base=True,
    stages=Stages(
        objective="product", target="W", metric="identity", selection="leading r",
        split="sqrt, sqrt", scale="1/s", base="without s B A",
    ),
)  # fmt: skip
def pissa(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, so that W - s B A is W without its r leading triplets.

    The N of "pissa_niter_N" is the number of steps of the block Krylov method; "pissa" takes 8.

    Raises:
        ConfigError: the weight has fewer than r singular values, or a random start of PEFT is to be found again.
        DegenerateError: fewer than r differ from zero.
    """
    if spec.repeats and spec.number is not None:
        raise ConfigError(
            f"The file does not hold what PEFT's 'pissa_niter_{spec.number}' took from the base, and it was random. "
            "Save it in PEFT with path_initial_model_for_weight_conversion, or merged."
        )
    exact = spec.repeats or (spec.settings is not None and spec.settings.exact)
    return taken_from_base(leading(weight, spec, "its weight", exact=exact, steps=spec.number), spec.scaling)
