"""What a plan hands to a layer, and the small modules factors are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lorafa.adapter import Variant


@dataclass(frozen=True)
class AdapterParts:
    """A built adapter that no layer owns yet."""

    A: Tensor
    """(r, in), or (E, r, in) for experts."""
    B: Tensor
    """(out, r), or (E, out, r)."""
    rank: int
    alpha: float
    variant: Variant
    dtype: torch.dtype
    bias: Tensor | None = None
    """(out,), the bias of B."""
    dropout: float = 0.0
    use_rslora: bool = False
    start: tuple[Tensor, Tensor] | None = None
    """A0 and B0 where s B0 A0 must not count: the part of the update the base weight already holds."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    trains: str = "AB"
    """The factors that are trained: "B" for a frozen A (LoRA-FA)."""
    fallback: str | None = None
    """Why the layer starts as by default instead of as asked."""
    times: int = 1
    """How often the update is applied: its scaling is this many times that of rank and alpha."""
    base: nn.Module | None = None
    """Takes the place of the base layer."""


@dataclass(frozen=True)
class Stored:
    """One tensor of an adapter; names are relative to the layer, or to the model where that is said."""

    key: str
    """Name in a file, without the adapter's: ``lora_A.weight``."""
    live: str | None
    """Name in the state dict: ``lora_A.default.weight``. None for what a merged weight or bias stands in for: a state
    dict has the merged one."""
    tensor: Tensor

    def at(self, path: str) -> Stored:
        """The same, named from further out."""
        return replace(self, key=f"{path}.{self.key}", live=None if self.live is None else f"{path}.{self.live}")


def held_by(holder: str, name: str, held: nn.Module | nn.Parameter) -> Iterator[Stored]:
    """The parameters of what ``holder`` has for adapter ``name``, a module or a single parameter."""
    if isinstance(held, nn.Parameter):
        yield Stored(holder, f"{holder}.{name}", held)
    else:
        for key, parameter in held.named_parameters():
            yield Stored(f"{holder}.{key}", f"{holder}.{name}.{key}", parameter)


class Extras(nn.Module):
    """What a variant keeps beside A and B in one holder, as ``<holder>.<adapter>.weight`` or by other keys.

    A tensor is a parameter, or a buffer where it is not trained; a state dict has it unless it is neither trained nor
    saved.
    """

    def hold(self, key: str, value: Tensor, *, trained: bool = True, saved: bool = True) -> None:
        """Take in a tensor."""
        if trained:
            self.register_parameter(key, nn.Parameter(value))
        else:
            self.register_buffer(key, value, persistent=saved)


def linear_holder(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear around an existing weight (out, in): nothing is initialised, nothing drawn."""
    holder = nn.Linear.__new__(nn.Linear)  # its constructor would draw a weight, on the meta device too
    nn.Module.__init__(holder)
    holder.out_features, holder.in_features = weight.shape
    holder.weight = nn.Parameter(weight)
    holder.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return holder
