"""LoRA-SB: start at the first step of full fine-tuning, cut to rank r (Ponkshe et al. 2024, arXiv:2411.19557).

A and B span the step and stay; the core between them is trained (:mod:`lorafa.variants.lora_sb`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import leading, whole_gradient
from lorafa.numerics.linalg import NOISE_STEPS
from lorafa.settings.checks import check_number
from lorafa.spec import LayerSpec


@dataclass
class LoraSBConfig:
    """How large the step is."""

    eta: float = 1e-5
    """By how much every entry of the weight would change. The authors take the learning rate of their first step of
    training: its largest value over the number of warm-up steps."""

    def __post_init__(self) -> None:
        check_number("eta", self.eta, "a number > 0", 0)


def without_step(weight: Tensor, spec: LayerSpec) -> InitResult:
    """Random orthonormal A and B, and the variant's R = 0: no step, but R has a gradient.

    B = 0, as by default, would leave nothing to train, for B stays as it is.

    Raises:
        ConfigError: r > min(out, in).
    """
    check_rank(spec, weight)
    generator = spec.generator()
    A, B = (torch.linalg.qr(torch.randn(n, spec.rank, generator=generator)).Q for n in reversed(weight.shape))
    return InitResult(A.mT, B)


@initializer(
    needs=("gradient",),
    settings=LoraSBConfig,
    trains="",
    keeps_function=False,
    whole_gradients=True,
    variant="lora_sb",
    otherwise=without_step,
    stages=Stages(
        objective="product", target="-eta sign(G)", metric="identity", selection="leading r",
        split="orthonormal, with S in a core between them", scale="1/s", base="kept",
    ),
)  # fmt: skip
def lora_sb(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """s B R A = [-eta sign(G)]_r: Adam's first step, with B and A^T orthonormal and R = S / s (equations 9, 10).

    Raises:
        ConfigError: r > min(out, in).
        CalibrationError: the statistics hold a sketch of the gradient, which does not have its signs.
        DegenerateError: the gradient is not finite, or its signs have fewer than r singular values other than zero.
    """
    settings: LoraSBConfig = spec.settings or LoraSBConfig()
    G = whole_gradient(stats, spec, "LoRA-SB takes the signs of all entries")
    step = leading(-G.sign(), spec, "the sign of its gradient", steps=NOISE_STEPS)
    core = torch.diag(settings.eta / spec.scaling * step.S)
    return InitResult(step.Vh, step.U, extras={"core": core})
