"""DoRA: W' = m * (W + s B A) / ||W + s B A||, output row by output row (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafa.adapter import Adapter, Extra, Stage, Variant, full_precision
from lorafa.numerics.dropped_base import dropped_base_linear
from lorafa.numerics.fused import compute_dtype, is_traced, low_rank_linear
from lorafa.numerics.linalg import working_dtype
from lorafa.spec import LayerSpec

_TINY = 1e-30  # of a squared norm in float32: an all-zero row keeps a finite gain


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    """||W + s B A|| of each output row, (out,), without forming B A.

    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s <b_i, W A^T>_i + s^2 b_i (A A^T) b_i^T: equation 5 of the paper, expanded.
    Costs 2 r in out multiplications and O(r (in + out)) memory beyond the float32 view of the weight.
    """
    dtype = working_dtype(weight.dtype)
    W, A, B = weight.to(dtype), A.to(dtype), B.to(dtype)
    own = torch.linalg.vector_norm(W, dim=1).square()
    with full_precision(W):
        if isinstance(scaling, Tensor):
            along = 2 * scaling * (W @ A.T) + scaling**2 * (B @ (A @ A.T))
        else:
            along = torch.addmm(W @ A.T, B, A @ A.T, beta=2 * scaling, alpha=scaling**2)
        # own + <along, b_i> of each row, as one operation
        squares = torch.baddbmm(own[:, None, None], along[:, None, :], B[:, :, None]).flatten()
    return squares.clamp_min(_TINY).sqrt()


class DoRA(Variant):
    """DoRA over any formula of B A; the magnitude m, (out,), is trained.

    The norm is a constant in backward (section 4.3 of the paper).
    """

    name = "dora"
    stage: ClassVar[Stage] = "norm"
    switch = "use_dora"
    extras: Mapping[str, Extra] = {"magnitude": Extra("lora_magnitude_vector")}
    hosts = frozenset({"linear", "embedding", "conv"})
    reads_weight = True
    takes_empty_ranks = True

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        return {"magnitude": row_norms(weight, A, B, spec.scaling)}

    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        gain = self._gain(adapter, weight).to(weight.dtype)
        return gain[:, None] * (weight + adapter.product()) - weight

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        layer, dropped = adapter.layer, adapter.drop(x)
        base_part: Tensor | None = None
        if dropped is not x:  # base and change see the same input, as in the authors' code; a start is part of the base
            base_part, x = adapter.start_of(dropped - x), dropped
            y = layer.base_output(x)
        change, bias = adapter.change(x), layer.base_bias()
        without_bias = y if bias is None else y - layer.per_output(bias).to(y.dtype)
        gain = layer.per_output(self._gain(adapter, layer.base_weight()))
        delta = torch.addcmul(change, without_bias + change, (gain - 1).to(y.dtype))
        return delta if base_part is None else delta + base_part

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        dense, p = adapter.layer.dense_weight(x), adapter.dropout
        if dense is None or (p and (is_traced() or adapter.running_start is not None)):
            return None
        weight, bias = dense
        if p and isinstance(weight, Tensor) and weight.requires_grad:
            return None
        gain = self._gain(adapter, adapter.layer.base_weight())
        terms: Any = {"weight": weight, "bias": bias, "gain": gain, "keep": adapter.kept(x, p)}
        if p:  # B takes the gain before it is rounded
            terms["source"] = adapter.dropout_source
            return dropped_base_linear(x, *adapter.running_factors, adapter.scaling, dropout=p, **terms)
        return low_rank_linear(x, *adapter.factors_in(compute_dtype(x)), adapter.scaling, **terms)

    def row_gain(self, adapter: Adapter, weight: Tensor) -> Tensor | None:
        return self._gain(adapter, weight).detach()

    def extras_of_gain(self, gain: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> dict[str, Tensor]:
        return {"magnitude": gain * row_norms(weight, A, B, scaling).to(gain)}

    def _gain(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """m / ||W + s B A||, (out,), in float32 or float64, with a gradient for m alone."""
        if not adapter.as_made:
            adapter.layer.require_readable(adapter)
        magnitude = adapter.extra("magnitude").flatten()
        with torch.no_grad():  # rounded as m is: the quotient is 1 at step 0 whatever m is stored in
            norms = row_norms(weight, *adapter.factors, adapter.scaling).to(magnitude.dtype)
        dtype = working_dtype(magnitude.dtype)
        if magnitude.dtype is dtype:
            return magnitude / norms
        lost = (norms == 0).to(dtype)  # float16 has no number as small as the length a row of zeros is given
        return (magnitude.to(dtype) + lost) / (norms.to(dtype) + lost)
