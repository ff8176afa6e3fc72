"""Adapter: one low-rank update of one weight, seen as one object.

The numbers live on the layer under PEFT's names (``layer.lora_A[name].weight``, ``layer.scaling[name]`` ...), because
other people's code reads and moves them there. This view is the one place that maps between those names and the
mathematics; formulas use the view only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorafa.backends.offload import in_memory, weight_of
from lorafa.linalg import working_dtype

if TYPE_CHECKING:
    from lorafa.layers.base import LoraLayer
    from lorafa.variants.base import Variant


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor s on B A: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def full_precision(tensor: Tensor) -> torch.autocast:
    """A block in which products of ``tensor`` keep its dtype: weights are never computed in autocast's."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)  # meta has no autocast


def update_factors(A: Tensor, B: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Factors of B A - B0 A0 for a start (A0, B0): those of (B - B0) A + B0 (A - A0), of rank 2 r.

    Exactly zero as long as A and B are at their start, and nothing cancels when they have left it.
    """
    if start is None:
        return A, B
    A0, B0 = start
    return torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)


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
        acts = module.training and self.layer.takes_dropout
        return float(module.p) if acts and isinstance(module, nn.Dropout) else 0.0

    @property
    def bias(self) -> Tensor | None:
        """The bias of B (``lora_bias``), (out,), not yet scaled."""
        return self.layer.factor_bias(self.name)

    @property
    def start(self) -> Start | None:
        start: Start | None = self.layer.lora_start._modules.get(self.name)  # type: ignore[assignment]
        return start if start is None else in_memory(start)

    def extra(self, kind: str) -> Tensor:
        """A parameter the variant added, by the variant's own name for it."""
        return weight_of(getattr(self.layer, self.variant.extras[kind])[self.name])

    @property
    def modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        """``lora_A`` and ``lora_B``; None where the factors are in no module, on an embedding."""
        held = self.layer._modules  # each attribute of a module costs a search
        A, B = held["lora_A"]._modules, held["lora_B"]._modules  # type: ignore[union-attr]
        return A.get(self.name), B.get(self.name)

    def extra_holders(self) -> Iterator[nn.Module]:
        """The modules that hold the parameters the variant added, in the order of its ``extras``."""
        return (getattr(self.layer, holder)[self.name] for holder in self.variant.extras.values())

    @property
    def as_made(self) -> bool:
        """Whether its modules need not be called: no hook is on them, and no other is in their place."""
        return self.layer.as_made(self)

    @property
    def folded_B(self) -> Tensor:
        """B with what stands between B and A multiplied in; B itself for most variants."""
        if not self.variant.folds:
            return self.B
        return self.variant.fold(self.B, {kind: self.extra(kind) for kind in self.variant.extras})

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the whole update; of rank 2 r where a frozen start is subtracted."""
        return update_factors(self.A, self.folded_B, None if self.start is None else (self.start.A, self.start.B))

    @property
    def running_start(self) -> Start | None:
        """The start that a forward pass has to subtract: none where the base that runs is without it already."""
        return None if self.layer.without_start else self.start

    @property
    def running_factors(self) -> tuple[Tensor, Tensor]:
        """Like :attr:`factors`, of what a forward pass adds to the base that runs."""
        return (self.A, self.folded_B) if self.layer.without_start else self.factors

    def product(self) -> Tensor:
        """The low-rank update s (B A - B0 A0), (out, in), in float32 (float64 where the factors are)."""
        return self._product(*self.factors)

    def start_product(self) -> Tensor:
        """s B0 A0, (out, in), in the same dtype; there must be a start."""
        assert self.start is not None
        return self._product(self.start.A, self.start.B)

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        dtype = working_dtype(A.dtype)
        with full_precision(A):
            return self.scaling * (B.to(dtype) @ A.to(dtype))

    def drop(self, x: Tensor) -> Tensor:
        """x with the adapter's dropout; x itself where it drops nothing."""
        if not self.as_made and self.layer.takes_dropout:
            dropped: Tensor = self.layer.lora_dropout[self.name](x)
            return dropped
        return nn.functional.dropout(x, self.dropout) if self.dropout else x

    def change(self, x: Tensor) -> Tensor:
        """What the update adds to the output of the base that runs: s (B A - B0 A0) x, in the layout of the output."""
        if not self.as_made:
            return self.layer.by_modules(self, x, drops=False)
        return self.layer.low_rank(x, *self.running_factors, self.scaling)

    def start_of(self, x: Tensor) -> Tensor | None:
        """s B0 A0 x, or None: what dropout on the adapter's input must not touch, because it belongs to the base."""
        start = self.running_start
        return None if start is None else self.layer.low_rank(x, start.A, start.B, self.scaling)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """The change of the weight, (out, in), given the base weight (out, in); differentiable in A, B and extras."""
        if not self.as_made:
            self.layer.require_readable(self)
        return self.variant.delta_weight(self, weight.to(working_dtype(weight.dtype)))

    def delta_output(self, x: Tensor, y: Tensor) -> Tensor:
        """The change of the layer's output, given its input x and the base layer's output y."""
        return self.variant.delta_output(self, x, y)
