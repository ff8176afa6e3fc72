"""Adapter: one low-rank update of one weight, seen as one object.

The numbers live on the layer under PEFT's names (``layer.lora_A[name].weight``, ``layer.scaling[name]`` ...), because
other people's code reads and moves them there. This view is the one place that maps between those names and the
mathematics; formulas use the view only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorafa.layers.base import LoraLayer
    from lorafa.variants.base import Variant


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype weights are computed in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor s on B A: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


class Start(nn.Module):
    """A0 and B0: the part of s B A that was there at step 0 and must not count (frozen, moves with the model)."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


class Adapter:
    """The update called ``name`` of ``layer``; A is (r, in), B is (out, r), in the layer's own layout of weights.

    For a stack of E experts A is (E, r, in) and B is (E, out, r).
    """

    __slots__ = ("layer", "name", "variant")

    def __init__(self, layer: LoraLayer, name: str, variant: Variant) -> None:
        self.layer = layer
        self.name = name
        self.variant = variant

    @property
    def A(self) -> Tensor:
        return self.layer.factor_A(self.name)

    @property
    def B(self) -> Tensor:
        return self.layer.factor_B(self.name)

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.name]

    @property
    def dropout(self) -> float:
        """The probability in force: 0 in eval mode, and where it cannot act."""
        module = self.layer.lora_dropout[self.name]
        acts = self.layer.training and self.layer.takes_dropout
        return float(module.p) if acts and isinstance(module, nn.Dropout) else 0.0

    @property
    def bias(self) -> Tensor | None:
        """The bias of B (``lora_bias``), (out,), not yet scaled."""
        return self.layer.factor_bias(self.name)

    @property
    def start(self) -> Start | None:
        return self.layer.lora_start._modules.get(self.name)  # type: ignore[return-value]

    def extra(self, kind: str) -> Tensor:
        """A parameter the variant added, by the variant's own name for it."""
        holder = getattr(self.layer, self.variant.extras[kind])[self.name]
        weight: Tensor = holder.weight
        return weight

    def product(self) -> Tensor:
        """s B A, (out, in), in float32 (float64 where the factors are)."""
        return self._scaled(self.B, self.A)

    def start_product(self) -> Tensor | None:
        """s B0 A0, or None."""
        start = self.start
        return None if start is None else self._scaled(start.B, start.A)

    def _scaled(self, B: Tensor, A: Tensor) -> Tensor:
        dtype = working_dtype(A.dtype)
        return self.scaling * (B.to(dtype) @ A.to(dtype))

    def delta_weight(self, weight: Tensor) -> Tensor:
        """The change of the weight, (out, in), given the base weight (out, in); differentiable in A, B and extras."""
        weight = weight.to(working_dtype(weight.dtype))
        removed = self.start_product()
        if removed is None:
            return self.variant.delta_weight(self, weight)
        return self.variant.delta_weight(self, weight - removed) - removed

    def delta_output(self, x: Tensor, y: Tensor) -> Tensor:
        """The change of the layer's output, given its input x and the base layer's output y."""
        start = self.start
        if start is None:
            return self.variant.delta_output(self, x, y)
        removed = self.layer.low_rank(x, start.A, start.B, self.scaling)
        return self.variant.delta_output(self, x, y - removed) - removed
