"""KaSA: delta W = s B diag(d) A with a trained diagonal (Wang et al. 2024, arXiv:2412.06071).

The penalties of the paper on d and on A and B are part of its loss, not of the formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorafa.adapter import Adapter
from lorafa.initializers.base import LayerSpec
from lorafa.variants.lora import LoRA


class KaSA(LoRA):
    """LoRA with B diag(d) in place of B; d is (r,). Asked for by its start, ``kasa``."""

    name = "kasa"
    extras: ClassVar[Mapping[str, str]] = {"diagonal": "lora_diag"}
    hosts = frozenset({"linear"})
    takes_bias = False
    folds = True

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """d = 1, which is LoRA."""
        return {"diagonal": torch.ones(spec.rank)}

    def extra_shapes(self, weight: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {"diagonal": (rank,)}

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        return z * adapter.extra("diagonal").to(z.dtype)

    def fold(self, B: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        return B * extras["diagonal"].to(B.dtype)
