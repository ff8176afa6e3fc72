"""What a plan hands to a layer, and the small modules factors are stored in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorafa.variants.base import Variant


@dataclass(frozen=True)
class AdapterParts:
    """A built adapter that no layer owns yet."""

    A: Tensor
    """(r, in), or (E, r, in) for experts."""
    B: Tensor
    """(out, r), or (E, out, r)."""
    rank: int
    alpha: float
    scaling: float
    variant: Variant
    dtype: torch.dtype
    bias: Tensor | None = None
    """(out,), the bias of B."""
    dropout: float = 0.0
    use_rslora: bool = False
    start: tuple[Tensor, Tensor] | None = None
    """A0 and B0 where s B0 A0 must not count: the part of the update the base weight already holds."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    freeze_A: bool = False
    """Whether only B is trained (LoRA-FA)."""
    times: int = 1
    """How often the update is applied: its scaling is this many times ``scaling``."""


class Weight(nn.Module):
    """A parameter that PEFT keeps in a module of its own, as ``<holder>.<adapter>.weight``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def linear_holder(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear around an existing weight (out, in): nothing is initialised, nothing drawn."""
    out, in_ = weight.shape
    holder = nn.Linear(in_, out, bias=False, device="meta")
    holder.weight = nn.Parameter(weight)
    if bias is not None:
        holder.bias = nn.Parameter(bias)
    return holder
