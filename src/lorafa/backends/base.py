"""Backend: how a kind of base layer stores its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafa.backends.oddities import (
    changing_hooks,
    fixed,
    is_hooked,
    is_plain,
    odd_storage,
    own_forward,
    tensor_like,
    unsettled,
)
from lorafa.backends.offload import hooked_as, in_memory, without_hooks
from lorafa.numerics.fused import Codes
from lorafa.numerics.linalg import all_finite

__all__ = ["Backend", "is_finite", "is_hooked", "is_plain", "replaced"]


class Backend(ABC):
    """Every weight goes in and out as a matrix (out, in); the layout inside is up to the back end.

    The laws: ``base(x) == linear(x, weight(base), bias(base))`` in the sense of the layer's kind, and ``with_weight``
    leaves the layer it was given alone. A back end that is not sure of a layer says why: :meth:`serves` is asked before
    an adapter is put on it, :meth:`reads` before anything is computed from its weight (a start, the norms of DoRA),
    :meth:`merges` before another weight is put in the place of its own. What it has answered with None is relied upon.
    """

    host: ClassVar[str]
    """The kind of layer that carries the adapters: a name in lorafa.layers.LAYERS."""
    fan_in_fan_out: ClassVar[bool | None] = None
    """What PEFT wants this setting to be for such a layer; None: it does not ask."""
    quantized: ClassVar[bool] = False
    """Whether the layer keeps its weight in fewer bits than it computes in, so that :meth:`weight` is an approximation
    of the one it was made from."""
    can_rest: ClassVar[bool] = True
    """Whether hooks of accelerate can bring the layer's weight in for each call."""
    fills: ClassVar[bool] = True
    """Whether ``load_state_dict`` takes what ``state_dict`` of such a layer gives."""
    rounds_inputs: ClassVar[float] = 0.0
    """How far the output may be from ``linear(x, weight, bias)``, as a share of its norm: the layer rounds x too."""
    inherits: ClassVar[bool] = False
    """Whether it may serve subclasses of the layer type it is registered for: :attr:`formula` tells it which."""
    weight_name: ClassVar[str] = "weight"
    """What the layer calls the tensor that :meth:`weight` is a view of."""
    bias_name: ClassVar[str] = "bias"
    formula: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Methods of the layer that compute its output -> full names of functions that do so by the law above."""

    def serves(self, layer: nn.Module) -> str | None:
        """Why no adapter can be put on the layer; None if one can.

        An adapter adds s B A x to the layer's output, whatever way the layer comes by that: for a linear layer this is
        well defined for each forward, hook and computed weight, so that storage alone decides here.
        """
        return odd_storage(layer, self.weight_name, self.stored_shape(layer))

    def reads(self, layer: nn.Module) -> str | None:
        """Why the output may be no ``linear(x, weight, bias)``, or ``weight`` another one at each call; None: it is."""
        odd = own_forward(layer, self.formula) or changing_hooks(layer)
        return odd or (None if self.quantized else unsettled(layer, self.weight_name, self.bias_name))

    def merges(self, layer: nn.Module) -> str | None:
        """Why :meth:`with_weight` would not change the output as an adapter does; None: it would."""
        odd = None if self.quantized else fixed(layer, self.weight_name, self.bias_name)
        return odd or own_forward(layer, self.formula) or changing_hooks(layer)

    def stored_shape(self, layer: nn.Module) -> tuple[int, ...] | None:
        """The shape that the layer's settings give the tensor :attr:`weight_name`; None where they give none."""
        return None

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
        """The dtype the weight is stored in; float32 where it is in no tensor of the layer."""
        stored = tensor_like(layer, self.weight_name)
        return torch.float32 if stored is None else stored.dtype

    def dense(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) if layer(x) is linear(x, weight, bias) on ordinary tensors, else None."""
        return None

    def codes(self, layer: nn.Module) -> Codes | None:
        """The frozen weight of a quantized layer to multiply by, where layer(x) is ``codes.times(x, bias)``, else None.

        The layer's own forward then does not run, unless hooks are on it.

        Raises:
            BackendError: in its present state the layer has no gradient.
        """
        return None

    def keeps_beside(self, layer: nn.Module) -> tuple[object, ...]:
        """What belongs to the weight and is in no parameter or buffer: layers that share the one have to share it."""
        return ()

    def prepare(self, layer: nn.Module) -> None:  # noqa: B027  (most have nothing to set)
        """Set the layer so that it can be trained through whatever is done with it between; its numbers stay."""

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout and dtype of the layer's own weight."""
        return matrix.to(self.weight(layer).dtype)

    @abstractmethod
    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A layer that computes with ``weight`` (out, in) and ``bias`` (out,); the laws are tested on it."""


def replaced(layer: nn.Module, **values: Tensor | None) -> nn.Module:
    """A copy of ``layer`` that shares everything with it but the named parameters or buffers; None keeps one.

    Where the weights of ``layer`` rest elsewhere, those of the copy do too, in main memory, and are brought in alike.

    Raises:
        BackendError: a hook of accelerate is on it that does something else than moving tensors.
    """
    here = in_memory(layer)
    new = without_hooks(here)
    for name, value in values.items():
        parameter, buffer = here._parameters.get(name), here._buffers.get(name)
        if value is not None and parameter is not None:
            rounded = value.to(parameter).contiguous()
            new._parameters[name] = nn.Parameter(rounded, requires_grad=parameter.requires_grad)
        elif value is not None and buffer is not None:
            new._buffers[name] = value.to(buffer).contiguous()
    return hooked_as(new, layer)


def is_finite(new: nn.Module, old: nn.Module) -> bool:
    """Whether ``new`` holds no inf and no nan in what it does not share with ``old``: rounding to float16 makes inf."""
    shared = {id(tensor) for tensor in (*old._parameters.values(), *old._buffers.values())}
    here: nn.Module = in_memory(new)
    own = [t for t in (*here.parameters(recurse=False), *here.buffers(recurse=False)) if id(t) not in shared]
    return all(map(all_finite, own))
