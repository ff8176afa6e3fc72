"""LoRA-DA: the natural gradient's step, shrunk where the sample's noise is large (arXiv:2510.24561, version 3).

With G the gradient, C the second moment of the inputs and Y the diagonal one of a token's output gradient, the step is
Delta = -Y^-1 G C^-1. An estimate from N rows has noise tr(Y^-1) / N C^-1 in Delta^T Delta, so A takes the leading
eigenvectors of alpha Delta^T Delta - beta tr(Y^-1) / N C^-1, and B = Delta A^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.calibration.gradient import WHITENING, metric_inverse
from lorafa.errors import ConfigError
from lorafa.initializers.base import TRAIN_ROWS, DegenerateError, InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import check_gamma, known_gamma, require_finite, require_moment, whole_gradient
from lorafa.numerics.linalg import wide
from lorafa.settings.checks import check_int, check_number
from lorafa.spec import LayerSpec

SAMPLE = "sample"


@dataclass
class LoraDAConfig:
    """How large the step is, and how much noise counts."""

    alpha: float = 1.0
    """What the step itself counts in the choice of directions."""
    beta: float = 0.03
    """What its noise counts against it; 0 takes the leading directions of the step."""
    samples: int | str = "sample"
    """N, by which noise is divided: "sample", the rows the gradient was read of; "train", the rows that are trained on,
    as in the authors' code, with which the noise counts for next to nothing (a run knows it, elsewhere pass the
    number)."""
    stable_gamma: float | str = 1024.0
    """A and B are divided by the root of gamma: the largest singular value of B A is 1 / gamma at most. "auto" picks
    it by the loss on held-out rows, which :func:`lorafa.initialize` does."""

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, "a number > 0", 0)
        check_number("beta", self.beta, "a number >= 0", 0, closed="[")
        if self.samples not in (SAMPLE, TRAIN_ROWS):
            check_int("samples", self.samples, at_least=1)
        check_gamma(self.stable_gamma)


@initializer(
    needs=("second_moment", "gradient", "output_moment"),
    settings=LoraDAConfig,
    keeps_function=False,
    whole_gradients=True,
    stages=Stages(
        objective="product", target="-Y^-1 G C^-1", metric="identity, with a penalty on noise",
        selection="leading r of the penalized", split="A orthonormal, B = target A^T", scale="1 / gamma", base="kept",
    ),
)  # fmt: skip
def lora_da(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B A = Delta A^T A with orthonormal rows of A, over gamma; Delta is divided by its largest singular value before.

    Y and C are damped by a hundredth of their mean, relative to their size; the authors' code adds 1e-6 to both, which
    is more than all of Y where gradients are small. Whole gradients are collected, out x in numbers of float32 for
    every layer at once.

    Raises:
        ConfigError: r > min(out, in), gamma is still "auto", or samples still "train".
        CalibrationError: the statistics hold a sketch of the gradient, collected for another start.
        DegenerateError: gradient or inputs are zero or not finite.
    """
    check_rank(spec, weight)
    settings: LoraDAConfig = spec.settings or LoraDAConfig()
    gamma = known_gamma(settings.stable_gamma, "1024 is the authors'")
    G = wide(whole_gradient(stats, spec, "LoRA-DA decomposes the natural gradient, which takes all entries"))
    C, Y = require_moment(stats, "second_moment", spec), wide(stats["output_moment.Y"])
    require_finite(Y, "the second moment of its output's gradient")
    if not G.any() or not Y.any():
        raise DegenerateError("its gradient is zero")
    inverse_Y, inverse_C = 1 / (Y + WHITENING * Y.mean()), wide(metric_inverse(C))
    step = -inverse_Y[:, None] * G @ inverse_C
    largest = torch.linalg.matrix_norm(step, 2)
    step = step / largest
    noise = inverse_Y.sum() / (_samples(settings, stats) * largest**2)
    vectors = torch.linalg.eigh(settings.alpha * step.mT @ step - settings.beta * noise * inverse_C).eigenvectors
    A = vectors[:, -spec.rank :].flip(-1).mT
    B = step @ A.mT
    size = gamma**-0.5
    return InitResult((A * size).to(C), (B * size).to(C))


def _samples(settings: LoraDAConfig, stats: Mapping[str, Tensor]) -> int:
    if settings.samples == TRAIN_ROWS:
        raise ConfigError(
            "samples='train' is the number of rows that are trained on, which only a run knows. Pass the number, or "
            "samples='sample' for the rows the gradient was read of."
        )
    return int(stats["output_moment.rows"]) if settings.samples == SAMPLE else int(settings.samples)
