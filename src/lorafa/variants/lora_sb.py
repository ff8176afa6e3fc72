"""LoRA-SB: delta W = s B R A, of which the core R alone is trained (Ponkshe et al. 2024, arXiv:2411.19557).

For orthonormal A and B the gradient of R, s B^T G A^T, is that of the best step the span of A and B allows, whatever
the step before it was (theorem 2 of the paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorafa.adapter import Adapter, full_precision, working_dtype
from lorafa.functional import low_rank_linear
from lorafa.initializers.base import LayerSpec
from lorafa.variants.base import Variant


class LoRASB(Variant):
    """R is (r, r); the start ``lora_sb`` asks for it. Computed as plain LoRA with B R, so that x is not kept."""

    name = "lora_sb"
    extras: ClassVar[Mapping[str, str]] = {"core": "lora_core"}
    hosts = frozenset({"linear"})
    folds = True

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """R = 0, which changes nothing, where the start has none of its own."""
        return {"core": torch.zeros(spec.rank, spec.rank)}

    def extra_shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {"core": (rank, rank)}

    def fold(self, B: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        dtype = working_dtype(B.dtype)
        with full_precision(B):
            return B.to(dtype) @ extras["core"].to(dtype)

    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        A, BR = self._factors(adapter)
        with full_precision(A):
            return adapter.scaling * (BR @ A.to(BR.dtype))

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        return adapter.layer.low_rank(x, *self._factors(adapter), adapter.scaling, adapter.dropout)

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        dense = adapter.layer.dense_weight(x)
        if dense is None:
            return None
        weight, bias = dense
        factors, p = self._factors(adapter), adapter.dropout
        return low_rank_linear(x, *factors, adapter.scaling, weight=weight, bias=bias, dropout=p)

    def _factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """A and B R."""
        return adapter.A, self.fold(adapter.B, {"core": adapter.extra("core")})
