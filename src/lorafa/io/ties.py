"""Tied adapters in files: PEFT writes both ends, so both are written, and compared when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lorafa.errors import CheckpointError
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.surgery.alone import hosts_alone, layers_alone


def tied_tensors(
    layers: Iterable[tuple[str, LoraLayer]], name: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The factors of layers whose adapter ``name`` is another layer's, by key, out of those of the owner."""
    return {
        key: _turned(tensors[source], transposed).clone(memory_format=torch.contiguous_format)
        for key, source, transposed in _tied_factors(layers, name)
    }


def check_ties(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a file has different values for what is one parameter of adapter ``name`` here."""
    found = [(key, host) for key, _, host in hosts_alone(model, name)]
    for key, source, transposed in (*_tied_factors(layers_alone(model, name), name), *_shared(found, name)):
        if key in tensors and source in tensors:
            one, other = tensors[key], _turned(tensors[source], transposed)
            if one.shape == other.shape and not torch.equal(one, other):
                raise CheckpointError(
                    f"The tensors {source!r} and {key!r} have different values, but the model ties them "
                    "(ensure_weight_tying). Nothing was loaded. They were trained apart: load them by a config with "
                    "ensure_weight_tying=False (PeftModel.from_pretrained(..., config=...))."
                )


def _turned(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.T if transposed else tensor


def _tied_factors(layers: Iterable[tuple[str, LoraLayer]], name: str) -> Iterator[tuple[str, str, bool]]:
    """(key, key of the owner's factor, whether it is that one's transpose)."""
    layers = list(layers)
    paths = {id(layer): path for path, layer in layers}
    for path, layer in layers:
        tied = layer.adapters[name].tied_to if name in layer.adapters else None
        if tied is not None:
            owner, transposed = tied
            A, B = owner.factor_names
            own = (B, A) if transposed else (A, B)
            for key, source in zip(layer.factor_names, own, strict=True):
                yield f"{path}.{key}", f"{paths[id(owner)]}.{source}", transposed


def _shared(found: Iterable[tuple[str, Host]], name: str) -> Iterator[tuple[str, str, bool]]:
    """The same for one parameter that several hosts store, as copies of tied modules do (``modules_to_save``)."""
    first: dict[int, str] = {}
    for path, host in found:
        for key, parameter in host.stored_parameters(name).items():
            source = first.setdefault(id(parameter), f"{path}.{key}")
            if source != f"{path}.{key}":
                yield f"{path}.{key}", source, False
