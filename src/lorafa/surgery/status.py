"""What state adapters are in: counted, listed, summed up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor, nn

from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.layers.saved import ModulesToSaveWrapper
from lorafa.layers.tokens import TrainableTokensWrapper
from lorafa.surgery.walk import hosts, user_model

T = TypeVar("T")
Irregular = Literal["irregular"]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters, each counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


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


_TYPES = {
    "linear": "lora.Linear",
    "embedding": "lora.Embedding",
    "attention": "lora.MultiheadAttention",
    "experts": "lora.ParamWrapper",
}
"""PEFT's names for the kinds of layer; a convolution is called after its base."""


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The status of every adapted layer, in the order of the model; works on injected models too.

    Names are paths in the ``base_model`` of a PeftModel, as in PEFT, or in an injected model.
    """
    inner = user_model(model)
    prefix = "" if inner is model else "model."
    return [_status(prefix + path, host) for path, host in hosts(inner)]


def _status(path: str, host: Host) -> LayerStatus:
    if isinstance(host, LoraLayer):
        return _layer_status(path, host)
    if isinstance(host, ModulesToSaveWrapper):
        return _wrapper_status(path, "ModulesToSaveWrapper", host, dict(host.modules_to_save.items()))
    assert isinstance(host, TrainableTokensWrapper)
    return _wrapper_status(
        f"{path}.token_adapter", "TrainableTokensLayer", host, dict(host.token_adapter.trainable_tokens_delta.items())
    )


def _layer_status(path: str, layer: LoraLayer) -> LayerStatus:
    parameters: dict[str, list[Tensor]] = {
        name: [*layer.stored_parameters(name).values()] or [adapter.A, adapter.B]  # a tied one's are another layer's
        for name, adapter in layer.adapters.items()
    }
    base = layer.get_base_layer()
    dense = getattr(base, "weight", None) is not None or layer.kind in ("attention", "experts")
    return LayerStatus(
        name=path,
        module_type=_TYPES.get(layer.kind) or f"lora.{type(base).__name__}",
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_adapters),
        requires_grad={name: _same(p.requires_grad for p in own) for name, own in parameters.items()},
        available_adapters=sorted(layer.adapters),
        devices={name: sorted({p.device.type for p in own}) for name, own in parameters.items()},
        quantization_backend=None if dense else type(base).__name__,
    )


def _wrapper_status(
    path: str, kind: str, host: ModulesToSaveWrapper | TrainableTokensWrapper, own: Mapping[str, nn.Module | Tensor]
) -> LayerStatus:
    parameters = {name: [held] if isinstance(held, Tensor) else list(held.parameters()) for name, held in own.items()}
    return LayerStatus(
        name=path,
        module_type=kind,
        enabled=not host.disable_adapters,
        active_adapters=[name for name in host.active_adapters if name in own],
        merged_adapters=[],
        requires_grad={name: _same(p.requires_grad for p in held) for name, held in parameters.items()},
        available_adapters=sorted(parameters),
        devices={name: sorted({p.device.type for p in held}) for name, held in parameters.items()},
    )


def _same(values: Iterable[T]) -> T | Irregular:
    listed = list(values)
    return listed[0] if all(value == listed[0] for value in listed) else "irregular"


def get_model_status(model: nn.Module) -> ModelStatus:
    """The status of the whole model; works on injected models too."""
    layers = get_layer_status(model)
    trainable, total = count_parameters(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    inner = user_model(model)
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
        merged_adapters=_merged(layers),
        requires_grad={name: _same(values) for name, values in flags.items()},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
        quantization_backend=_same(quantized) if layers else None,
    )


def _merged(layers: Sequence[LayerStatus]) -> list[str] | Irregular:
    """The adapters merged in every layer that has them; "irregular" if one is merged in some of its layers only."""
    factors = [layer for layer in layers if layer.module_type.startswith("lora.")]
    merged = sorted({name for layer in factors for name in layer.merged_adapters})
    waiting = {name for layer in factors for name in layer.available_adapters if name not in layer.merged_adapters}
    return "irregular" if waiting & set(merged) else merged
