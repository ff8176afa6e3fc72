"""What a plan hands to a layer, and the small modules factors are stored in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

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

    def at(self, key: str, path: str) -> Stored:
        """The same, named from further out.

        Args:
            key: the layer's path in files.
            path: its path in the model.
        """
        return Stored(f"{key}.{self.key}", None if self.live is None else f"{path}.{self.live}", self.tensor)


def held_by(holder: str, name: str, held: nn.Module | nn.Parameter) -> Iterator[Stored]:
    """The parameters of what ``holder`` has for adapter ``name``, a module or a single parameter."""
    if isinstance(held, nn.Parameter):
        yield Stored(holder, f"{holder}.{name}", held)
    else:
        # as they lie where there are no modules inside: at a third of the time
        named = held.named_parameters() if held._modules else held._parameters.items()
        for key, parameter in named:
            if parameter is not None:
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
    sizes, held = holder.__dict__, holder._parameters  # each attribute of a module that is set costs a search
    sizes["out_features"], sizes["in_features"] = weight.shape
    held["weight"], held["bias"] = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    return holder


def freeze_all_but(holders: Iterable[nn.ModuleDict | nn.ParameterDict], names: Collection[str]) -> None:
    """Let what all other adapters have in these holders get no gradient, in one pass over them."""
    for holder in holders:
        for name, parameter in holder._parameters.items():
            if name not in names and parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
        for name, held in holder._modules.items():
            if name not in names and held is not None and (held._parameters or held._modules):
                for own in held.parameters() if held._modules else held._parameters.values():
                    if own is not None and own.requires_grad:
                        own.requires_grad_(False)


def set_mode(module: nn.Module, training: bool) -> None:
    """``module.train(training)``, at a fraction of its time for what is in that mode and holds nothing."""
    if module._modules or type(module).train is not nn.Module.train:
        module.train(training)
    elif module.training is not training:
        object.__setattr__(module, "training", training)  # torch's own looks for parameters and modules first
