"""LoftQ: quantize W, and let A and B start at what the codes lose (Li et al. 2023, arXiv:2310.08659, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.backends.int8 import Int8Linear
from lorafa.backends.nf4 import NF4Linear
from lorafa.backends.quantized import QuantizedLinear
from lorafa.initializers.base import InitResult, Stages, check_rank, initializer
from lorafa.initializers.kaiming import kaiming
from lorafa.initializers.stages import halves, require_finite
from lorafa.numerics.linalg import NOISE_STEPS, float_matrix, leading_svd
from lorafa.settings.methods import LoftQConfig
from lorafa.spec import LayerSpec

QUANTIZERS: Mapping[int, type[QuantizedLinear]] = {4: NF4Linear, 8: Int8Linear}


def quantize(weight: Tensor, spec: LayerSpec) -> QuantizedLinear:
    """Q_T of T alternations: Q_1 = q(W), Q_t+1 = q(W - [W - Q_t]_r), where q stands for the codes of W (out, in).

    It depends on W, r and the settings alone, so that it is found again when an adapter is loaded: what is quantized
    after the first alternation is computed in float64, whose rounding moves no code.
    """
    settings = spec.settings or LoftQConfig()
    quantizer = QUANTIZERS[settings.loftq_bits]
    quantized = quantizer(weight)
    exact = weight.detach().double() if settings.loftq_iter > 1 else weight
    for _ in range(settings.loftq_iter - 1):
        lost = exact - quantized.dequantize(torch.float64)
        quantized = quantizer(exact - leading_svd(lost, spec.rank, torch.Generator().manual_seed(0)).product())
    return quantized


def fit(lost: Tensor, size: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """A and B with s B A = [W - Q]_r, the best approximation of rank r; divided by sqrt(s), which PEFT leaves out.

    Where nothing is left to fit, singular values being zero, rows of A are random and columns of B zero: both zero
    would never train.

    Args:
        lost: W - Q, (out, in).
        size: the norm of W: what is smaller than its rounding is zero.
    """
    found = leading_svd(lost, spec.rank, spec.generator(), NOISE_STEPS)
    A, B = halves(found, 1 / spec.scaling)
    nothing = found.S.le(torch.finfo(lost.dtype).eps * size)
    random = kaiming(lost, {}, spec).A.to(A)
    return torch.where(nothing[:, None], random, A), torch.where(nothing, 0.0, B)


@initializer(
    reads_weight=True,
    keeps_function=False,
    quantizer=quantize,
    needs_settings=True,
    peft_makes_on=frozenset({"linear", "embedding"}),
    stages=Stages(
        objective="product", target="W - q(W), iterated", metric="identity", selection="leading r",
        split="sqrt, sqrt", scale="1/s", base="replaced by q(W)",
    ),
)  # fmt: skip
def loftq(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """The base becomes Q_T, and s B A = [W - Q_T]_r: the nearest to W that A and B can bring it.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: W holds inf or nan.
    """
    check_rank(spec, weight)
    require_finite(weight, "its weight")
    W = float_matrix(weight)
    quantized = quantize(weight, spec)
    A, B = fit(W - quantized.dequantize(W.dtype), torch.linalg.matrix_norm(W), spec)
    return InitResult(A, B, quantized=quantized)
