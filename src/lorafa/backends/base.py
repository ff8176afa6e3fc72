"""Backend: how a kind of base layer stores its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafa.backends.offload import hooked_as, in_memory, without_hooks
from lorafa.errors import BackendError


class Backend(ABC):
    """Every weight goes in and out as a matrix (out, in); the layout inside is the back end's affair.

    The laws: ``base(x) == linear(x, weight(base), bias(base))`` in the sense of the layer's kind, and ``with_weight``
    leaves the layer it was given alone.
    """

    host: ClassVar[str]
    """The kind of layer that carries the adapters: a name in lorafa.layers.LAYERS."""
    fan_in_fan_out: ClassVar[bool | None] = None
    """What PEFT wants this setting to be for such a layer; None: it does not ask."""
    quantized: ClassVar[bool] = False
    """Whether the layer keeps its weight in fewer bits than it computes in, so that :meth:`weight` is an approximation
    of the one it was made from."""

    @abstractmethod
    def weight(self, layer: nn.Module) -> Tensor:
        """The weight as (out, in); a view where the layer stores it densely, dequantized where it does not."""

    @abstractmethod
    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """A new layer like ``layer`` that holds ``weight`` (out, in), rounded to the layer's dtype once.

        ``bias`` (out,) replaces the layer's bias; None keeps it.
        """

    def bias(self, layer: nn.Module) -> Tensor | None:
        return getattr(layer, "bias", None)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in), without touching a quantized weight."""
        out, in_ = self.weight(layer).shape
        return int(out), int(in_)

    def full_shape(self, layer: nn.Module) -> tuple[int, ...]:
        """Shape of :meth:`weight`: (out, in), or (E, out, in) for a stack of experts."""
        return self.shape(layer)

    def dtype(self, layer: nn.Module) -> torch.dtype:
        """The dtype the weight is stored in; float32 where it is in no parameter of the layer."""
        return next((p.dtype for p in layer.parameters(recurse=False) if p.dim() > 1), torch.float32)

    def dense(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) if layer(x) is linear(x, weight, bias) on ordinary tensors, else None."""
        return None

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout and dtype of the layer's own weight."""
        return matrix.to(self.weight(layer).dtype)

    @abstractmethod
    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A layer that computes with ``weight`` (out, in) and ``bias`` (out,); the laws are tested on it."""


def replaced(layer: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """A copy of ``layer`` that shares everything with it but the named parameters; None keeps one.

    Where the weights of ``layer`` rest elsewhere, those of the copy do too, in main memory, and are brought in alike.

    Raises:
        BackendError: the layer computes such a parameter from others (weight norm, a parametrization), or a hook of
            accelerate is on it that does something else than moving tensors.
    """
    computed = [name for name in parameters if name not in layer._parameters]
    if computed:
        raise BackendError(
            f"The {computed[0]} of this {type(layer).__name__} is computed from other parameters (weight norm or "
            "another parametrization), so nothing can be merged into it. Remove the parametrization first."
        )
    new = without_hooks(in_memory(layer))
    for name, value in parameters.items():
        old = new._parameters[name]
        if value is not None and old is not None:
            new._parameters[name] = nn.Parameter(value.to(old).contiguous(), requires_grad=old.requires_grad)
    return hooked_as(new, layer)


def is_finite(new: nn.Module, old: nn.Module) -> bool:
    """Whether ``new`` holds no inf and no nan in what it does not share with ``old``: rounding to float16 makes inf."""
    shared = {id(tensor) for tensor in (*old._parameters.values(), *old._buffers.values())}
    here: nn.Module = in_memory(new)
    own = [t for t in (*here.parameters(recurse=False), *here.buffers(recurse=False)) if id(t) not in shared]
    return all(bool(torch.isfinite(t if t.dtype.itemsize > 1 else t.float()).all()) for t in own)


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is an ordinary one: no DTensor, no quantized subclass."""
    return tensor is None or type(tensor) in (Tensor, nn.Parameter, torch.nn.Buffer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see or change what passes through the layer."""
    torchs = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(torchs) or "forward" in layer.__dict__
