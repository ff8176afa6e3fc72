"""LoRA-SB: delta W = s B R A, of which the core R alone is trained (Ponkshe et al. 2024, arXiv:2411.19557).

For orthonormal A and B the gradient of R, s B^T G A^T, is that of the best step the span of A and B allows, whatever
the step before it was (theorem 2 of the paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, full_precision
from lorafa.initializers.base import LayerSpec
from lorafa.linalg import working_dtype
from lorafa.variants.lora import LoRA


class LoRASB(LoRA):
    """LoRA with B R in place of B; R is (r, r). Asked for by its start, ``lora_sb``."""

    name = "lora_sb"
    extras: ClassVar[Mapping[str, str]] = {"core": "lora_core"}
    hosts = frozenset({"linear"})
    takes_bias = False
    folds = True

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """R = 0, which changes nothing."""
        return {"core": torch.zeros(spec.rank, spec.rank)}

    def extra_shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {"core": (rank, rank)}

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        return nn.functional.linear(z, adapter.extra("core").to(z.dtype))

    def fold(self, B: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        dtype = working_dtype(B.dtype)
        with full_precision(B):
            return (B.to(dtype) @ extras["core"].to(dtype)).to(B.dtype)
