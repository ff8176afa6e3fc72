"""What state adapters are in: counted, listed, summed up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import nn

from lorafa.backends import backend_of
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.surgery.walk import hosts, lora_layers, user_model

T = TypeVar("T")
Irregular = Literal["irregular"]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters, each counted once; of a quantized layer the numbers it stands for."""
    sizes = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        backend = backend_of(module)
        if backend is not None and backend.quantized and backend.serves(module) is None:
            sizes.pop(id(module._parameters.get(backend.weight_name)), None)
            sizes[id(module)] = (math.prod(backend.full_shape(module)), False)
    return sum(n for n, trained in sizes.values() if trained), sum(n for n, _ in sizes.values())


@dataclass
class LayerStatus:
    """One adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


@dataclass
class ModelStatus:
    """The whole model; "irregular" where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The status of every adapted layer, in the order of the model; works on injected models too.

    Names are paths in the ``base_model`` of a PeftModel, as in PEFT, or in an injected model.
    """
    inner = user_model(model)
    prefix = "" if inner is model else "model."
    return [_status(prefix + path, host) for path, host in hosts(inner)]


def _status(path: str, host: Host) -> LayerStatus:
    own = {name: host.tensors_of(name) for name in host.held()}
    layer = host if isinstance(host, LoraLayer) else None
    holder = host.wrapped_path.rpartition(".")[0]  # PEFT lists the module that holds the wrapped one
    return LayerStatus(
        name=f"{path}.{holder}" if holder else path,
        module_type=host.peft_name,
        enabled=not host.disable_adapters,
        active_adapters=[name for name in host.active_adapters if layer is not None or name in own],
        merged_adapters=[] if layer is None else list(layer.merged_adapters),
        requires_grad={name: _same(t.requires_grad for t in held) for name, held in own.items()},
        available_adapters=sorted(own),
        devices={name: sorted({t.device.type for t in held}) for name, held in own.items()},
        quantization_backend=None if layer is None else _quantized(layer.get_base_layer()),
    )


def _quantized(base: nn.Module) -> str | None:
    """The type of a quantized base layer; None for any other."""
    backend = backend_of(base)
    return type(base).__name__ if backend is not None and backend.quantized else None


def _same(values: Iterable[T]) -> T | Irregular:
    listed = list(values)
    return listed[0] if all(value == listed[0] for value in listed) else "irregular"


def get_model_status(model: nn.Module) -> ModelStatus:
    """The status of the whole model; works on injected models too."""
    layers, inner = get_layer_status(model), user_model(model)
    trainable, total = count_parameters(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    flags = {n: [layer.requires_grad[n] for layer in layers if n in layer.requires_grad] for n in names}
    quantized = [layer.quantization_backend for layer in layers]
    return ModelStatus(
        base_model_type=type(inner).__name__,
        adapter_model_type="LoraModel" if inner is not model else "None",
        peft_types=dict.fromkeys(getattr(model, "peft_config", names), "LORA"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers) if layers else False,
        active_adapters=_same(layer.active_adapters for layer in layers) if layers else [],
        merged_adapters=_merged([layer for _, layer in lora_layers(inner)]),
        requires_grad={name: _same(values) for name, values in flags.items()},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
        quantization_backend=_same(quantized) if layers else None,
    )


def _merged(layers: Sequence[LoraLayer]) -> list[str] | Irregular:
    """The adapters merged in every layer that has them; "irregular" if one is merged in some of its layers only."""
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    waiting = {name for layer in layers for name in layer.adapters if name not in layer.merged_adapters}
    return "irregular" if waiting & set(merged) else merged
