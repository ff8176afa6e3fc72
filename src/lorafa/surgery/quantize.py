"""Starts that quantize put another layer in the place of the base: which layers allow it, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lorafa.backends.base import is_hooked
from lorafa.errors import AdapterError, BackendError
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import Place, tied_groups


def require_replaceable(target: Target, start: str) -> None:
    """Raise unless the target is a dense linear layer that nothing else depends on.

    Raises:
        BackendError: another kind of layer, one that is quantized already, or one with hooks.
        AdapterError: adapters are, or were, on the layer.
    """
    base, backend, name = target.base, target.backend, target.full_name
    said = f"init_lora_weights={start!r} quantizes dense linear layers"
    if backend.quantized:
        raise BackendError(
            f"{said}, and {name!r} is a {type(base).__name__}, quantized already. Put an ordinary adapter on it and "
            "fit that with replace_lora_weights_loftq."
        )
    if "weight" not in base._parameters or backend.dense(base) is None:
        raise BackendError(
            f"{said}, and {name!r} is a {type(base).__name__}. Leave it out with exclude_modules, or choose another "
            "start."
        )
    if target.wrapper is not None:
        others = ", ".join(map(repr, target.wrapper.adapters)) or "one that was deleted"
        raise AdapterError(
            f"{said}, but {name!r} carries other adapters ({others}), which were made for its dense weight. Take them "
            "off with unload(), or put this one on first."
        )
    if is_hooked(base):
        raise BackendError(
            f"{said}, but hooks are on {name!r}, which would be lost. Remove them, or put them on later."
        )


def require_unshared(everything: Iterable[Place], targets: Sequence[Target], start: str) -> None:
    """Raises BackendError if another module computes with the weight of a target: the two would come apart."""
    mine = {id(target.module) for target in targets}
    for group in tied_groups(everything) if mine else ():
        names = [place.name for place in group]
        if any(id(place.module) in mine for place in group):
            raise BackendError(
                f"init_lora_weights={start!r} quantizes dense linear layers, but {' and '.join(map(repr, names))} "
                "share one weight, which would stay in memory as it is. Leave them out with exclude_modules."
            )


def standing_in(base: nn.Module, quantized: nn.Module) -> nn.Module:
    """The quantized layer with the bias (the same parameter) and the mode of the layer whose place it takes."""
    quantized.bias = base._parameters.get("bias")  # type: ignore[assignment]
    return quantized.train(base.training)
