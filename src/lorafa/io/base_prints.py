"""Fingerprints of the base weights that adapters are on, whatever else was put around those layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.offload import in_memory
from lorafa.io.peft_format import in_state, pristine_tensors
from lorafa.layers.base import LoraLayer
from lorafa.storage.fingerprint import fingerprint
from lorafa.storage.tensors import is_part, whole
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.walk import Place, hosts, lora_layers, places, pristine_of


def base_fingerprint(
    model: nn.Module,
    names: Iterable[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    everything: Iterable[Place] | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Fingerprint of the pristine weights of the layers that carry ``adapter``, or of the layers called ``names``.

    Where neither is given it is that of all adapted layers. ``everything`` is every place of the model, where the
    caller knows them.

    A weight of which only a part is here is gathered by all processes, or taken from ``state_dict`` where that is
    given. Where neither gives all of it, it is recorded as not readable: a part is no description of the whole.
    """
    modules: Mapping[str, nn.Module]
    if names is None:
        modules = dict(fingerprinted(model, adapter))
    else:
        wanted = set(names)
        everything = places(model) if everything is None else everything
        modules = {place.name: place.module for place in everything if place.name in wanted}
    origins = {name: m.origin for name, m in modules.items() if isinstance(m, LoraLayer) and m.origin is not None}
    weights = {name: readable(module) for name, module in modules.items()}
    parts = {name: weight for name, weight in weights.items() if weight is not None and is_part(weight, 2)}
    if parts and state_dict is not None:
        live = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {name: in_state(state_dict, live.get(id(weight), "")) for name, weight in parts.items()}
        weights |= {name: None if weight is None else whole(weight, 2) for name, weight in found.items()}
    else:
        weights |= {name: whole(weight, 2) for name, weight in parts.items()}
    return fingerprint(weights.items()) | origins


def fingerprinted(model: nn.Module, adapter: str | None = None) -> list[tuple[str, LoraLayer]]:
    """The layers that carry an adapter, by the names of their modules; of several on one module the last."""
    layers = lora_layers(model) if adapter is None else layers_alone(model, adapter)
    by_module = {id(pristine_of(place.module)): place.name for place in reversed(list(places(model)))}
    named = {by_module[id(layer.pristine)]: layer for _, layer in layers if id(layer.pristine) in by_module}
    return list(named.items())


def readable(module: nn.Module) -> Tensor | None:
    """The dense weight of a layer as it is stored, wherever it rests, or None."""
    base = in_memory(pristine_of(module))
    backend, weight = backend_of(base), getattr(base, "weight", None)
    if backend is not None and backend.quantized:  # its codes may be stored as if they were numbers
        return None
    if isinstance(module, LoraLayer) and module.nests:  # a merged parameter is in the module itself
        weight = pristine_tensors(hosts(module)).get(id(weight), weight)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta else None
