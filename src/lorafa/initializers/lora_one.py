"""LoRA-One: one best rank-r step of the whole gradient, as A and B (Zhang et al. 2025, arXiv:2502.01235).

Some documents call the same start "LoRA-FA"; the training method of that name is another thing
(:mod:`lorafa.optimizers.lora_fa`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.calibration.gradient import gradient_triplets, whitening
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.initializers.stages import check_gamma, halves, known_gamma, mean_root_of_weight, require_triplets
from lorafa.settings.checks import check_choice
from lorafa.spec import LayerSpec


@dataclass
class LoraOneConfig:
    """How large the step is."""

    scale: str = "stable"
    """What A and B are multiplied with beyond the roots of the singular values: "stable" 1 / sqrt(gamma); "gd" 1 / s;
    "unit" 1; "weightS" the mean of sqrt(sigma_i(W) / s). With "stable" and normalize="layer" the largest singular value
    of s B A is s / gamma in every layer; for ``functional`` that of s B A M^1/2, in the metric M of its inputs."""
    stable_gamma: float | str = 128.0
    """gamma of "stable": larger means a smaller step. "auto" picks it by the loss on held-out rows, which
    :func:`lorafa.initialize` does."""
    normalize: str = "layer"
    """What singular values are divided by: the "layer"'s largest, the largest of all layers ("global"), or "none"."""

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("stable", "gd", "unit", "weightS"))
        check_choice("normalize", self.normalize, ("layer", "global", "none"))
        check_gamma(self.stable_gamma)
        if self.scale != "stable" and self.stable_gamma != type(self).stable_gamma:
            raise ConfigError(
                f"stable_gamma={self.stable_gamma!r} is the gamma of scale='stable', and scale is {self.scale!r}. Set "
                "scale='stable' or drop stable_gamma."
            )


@initializer(
    needs=("gradient",),
    reads_weight=True,
    settings=LoraOneConfig,
    keeps_function=False,
    stages=Stages(
        objective="product", target="-G", metric="identity", selection="leading r",
        split="sqrt, sqrt", scale="1/(gamma S_1)", base="kept",
    ),
)  # fmt: skip
def lora_one(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B A = -c [G]_r, shared evenly: B^T B = A A^T. The base stays, so that step 0 is the model after this step.

    With the defaults s B A = -(s / (gamma sigma_1)) [G]_r (algorithm 1 of the paper, in the authors' code of 2025).

    Raises:
        ConfigError, CalibrationError: r > min(out, in), or as :func:`step_size`.
        DegenerateError: the gradient has fewer than r singular values other than zero.
    """
    triplets = require_triplets(gradient_triplets(stats), spec.rank, weight, spec, "its gradient")
    A, B = halves(triplets, step_size(stats, "gradient", weight, spec))
    return InitResult(A, -B)


@initializer(
    needs=("second_moment", "whitened_gradient"),
    reads_weight=True,
    settings=LoraOneConfig,
    keeps_function=False,
    stages=Stages(
        objective="product", target="-G C^-1", metric="C^1/2 on the right", selection="leading r",
        split="sqrt, sqrt", scale="1/(gamma S_1)", base="kept",
    ),
)  # fmt: skip
def functional(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B A = -c [G C^-1/2]_r C^-1/2: the rank-r step that lowers the loss most for its change of the layer's outputs.

    The minimiser of <G, D> + ||D C^1/2||^2 / (2 c) over D of rank r, with C the second moment of the inputs, damped as
    in :func:`~lorafa.calibration.gradient.whitening`: in D C^1/2 it is LoRA-One's step, by Eckart and Young's theorem.
    Scales are those of LoRA-One, in units of the largest singular value of G C^-1/2.

    Raises:
        ConfigError, CalibrationError, DegenerateError: as :func:`lora_one`.
    """
    found = gradient_triplets(stats, "whitened_gradient")
    triplets = require_triplets(found, spec.rank, weight, spec, "its whitened gradient")
    A, B = halves(triplets, step_size(stats, "whitened_gradient", weight, spec))
    return InitResult(A @ whitening(stats["second_moment.C"]).to(A), -B)


def step_size(stats: Mapping[str, Tensor], name: str, weight: Tensor, spec: LayerSpec) -> Tensor:
    """c in B A = -c [G]_r, for the gradient statistic ``name``.

    Raises:
        CalibrationError: the largest singular value of all layers is asked for, and the statistics do not hold it.
        ConfigError: gamma is still "auto".
    """
    settings: LoraOneConfig = spec.settings or LoraOneConfig()
    return _factor(settings, weight, spec) / _normalizer(settings, stats, name, spec)


def _factor(settings: LoraOneConfig, weight: Tensor, spec: LayerSpec) -> float:
    if settings.scale == "gd":
        return 1 / spec.scaling**2
    if settings.scale == "unit":
        return 1.0
    if settings.scale == "weightS":
        return mean_root_of_weight(weight, spec) ** 2
    return 1 / known_gamma(settings.stable_gamma, "128 is the authors', for a model of 7 billion parameters")


def _normalizer(settings: LoraOneConfig, stats: Mapping[str, Tensor], name: str, spec: LayerSpec) -> Tensor:
    S = stats[f"{name}.S"]
    if settings.normalize == "layer":
        return S[0]
    if settings.normalize == "none":
        return torch.ones_like(S[0])
    if f"{name}.largest" not in stats:
        raise CalibrationError(
            f"{spec.name}: normalize='global' divides by the largest singular value of all layers, {name}.largest, "
            "which the statistics do not hold. Collect them with lorafa.collect_statistics, or set normalize='layer'."
        )
    return stats[f"{name}.largest"]
