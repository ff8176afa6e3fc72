"""LoraLinear: adapters on anything that computes x W^T + b, whatever way it stores W."""

from __future__ import annotations

from torch import Tensor

from lorafa.backends.base import is_hooked
from lorafa.functional import autocast_dtype, compute_dtype, low_rank_linear
from lorafa.layers.base import LoraLayer


class LoraLinear(LoraLayer):
    """x is (..., in), the output (..., out)."""

    kind = "linear"

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float = 0.0) -> Tensor:
        return low_rank_linear(x, A, B, scaling, dropout=dropout)

    def dense_weight(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        base = self.base_layer
        if is_hooked(base):
            return None
        dense = self.backend.dense(base)
        if dense is None or x.dtype is dense[0].dtype or compute_dtype(x) in (dense[0].dtype, autocast_dtype(x)):
            return dense
        return None  # the base layer says what is wrong with the dtypes
