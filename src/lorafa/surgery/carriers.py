"""Which modules can carry an adapter, and what is said of one that cannot."""

from __future__ import annotations

from torch import nn

from lorafa.backends import backend_of
from lorafa.backends.oddities import described, holds_codes, is_of_other_library
from lorafa.errors import TargetError
from lorafa.layers import LAYERS
from lorafa.layers.base import LoraLayer
from lorafa.surgery.walk import Place


def kind_of_layer(module: nn.Module) -> type[LoraLayer] | None:
    """The kind of layer that carries, or would carry, adapters on a module; None where none can."""
    if isinstance(module, LoraLayer):
        return type(module)
    backend = backend_of(module)
    return None if backend is None else LAYERS.get(backend.host)


def can_carry(module: nn.Module) -> bool:
    kind = kind_of_layer(module)
    return kind is not None and not kind.nests


def is_linear_of_others(module: nn.Module) -> bool:
    """Whether a module that no back end knows is a linear layer of another library: it is refused, not passed over."""
    return holds_codes(module) or is_of_other_library(module) is not None


def check_carries(place: Place) -> None:
    """Raises TargetError unless a back end is sure of the module; one that carries adapters was checked before."""
    module = place.module
    if not can_carry(module):
        kind, library = f"a {type(module).__name__}", is_of_other_library(module)
        if library is not None:
            kind += f" of {library}"
        elif holds_codes(module):
            kind = f"a quantized {described(module)}"
        raise TargetError(
            f"{place.name!r} is {kind}, which cannot carry an adapter. Supported are linear, embedding and convolution "
            "layers, nn.MultiheadAttention, and single parameters by target_parameters. Narrow target_modules, or add "
            "the name to exclude_modules."
        )
    backend = None if isinstance(module, LoraLayer) else backend_of(module)
    odd = None if backend is None else backend.serves(module)
    if odd is not None:
        raise TargetError(
            f"{place.name!r}: no back end knows this {described(module)}: {odd}. Leave it out with exclude_modules, or "
            "change the layer first."
        )
