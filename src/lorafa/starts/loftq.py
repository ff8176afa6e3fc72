"""LoftQ on a model whose base is quantized already: PEFT's ``replace_lora_weights_loftq``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter
from lorafa.errors import AdapterError, CheckpointError, SourceError, TargetError, shape_text
from lorafa.initializers.base import check_rank
from lorafa.initializers.loftq import fit
from lorafa.layers.base import LoraLayer
from lorafa.peft_model import PeftModel
from lorafa.spec import LayerSpec
from lorafa.storage.base_weights import BaseWeights
from lorafa.surgery.activate import require_adapters, require_unmerged
from lorafa.surgery.walk import name_of

_FAR = 0.5
"""Relative error beyond which codes do not stand for a weight; 4 bits make about 0.1, another weight 1.4."""


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Let an adapter on a quantized model start at what quantizing lost: s B A = [W - Q]_r (LoftQ, arXiv:2310.08659).

    The dense weights are read one at a time; the codes stay as they are. The factors are divided by sqrt(s), which PEFT
    leaves out.

    Args:
        model_path: where the dense weights are: a folder, a safetensors file, the index of a sharded model, or a Hub id
            whose files are in the local cache; None: where the model says it came from.
        adapter_name: a plain LoRA adapter. Layers that are not quantized keep their factors.
        callback: given the model and the name of a layer whose factors were just replaced, whether they may stay; if
            not, they are as before, bit for bit. The layers come in the order of the model.

    Raises:
        AdapterError: an unknown or merged adapter, or one that is not plain LoRA, or whose scaling is (almost) zero.
        TargetError: none of its layers is quantized.
        SourceError, CheckpointError: a file or tensor is missing, damaged or not finite, or is not what the layer was
            made from.
        ConfigError: a rank is larger than the weight's.

    After any of them, and after an error in ``callback``, the adapter is as it was.
    """
    adapters = _on_quantized_layers(peft_model, adapter_name)
    weights = BaseWeights(_own_name(peft_model) if model_path is None else model_path)
    fitted = [(name, adapter, _fitted(peft_model, name, adapter, weights)) for name, adapter in adapters]
    before = [(adapter, (adapter.A.clone(), adapter.B.clone())) for _, adapter in adapters]
    try:
        for (name, adapter, factors), (_, old) in zip(fitted, before, strict=True):
            _put(adapter, factors)
            if callback is not None and not callback(peft_model, name):
                _put(adapter, old)
    except BaseException:
        for adapter, old in before:
            _put(adapter, old)
        raise


def _put(adapter: Adapter, factors: tuple[Tensor, Tensor]) -> None:
    adapter.A.copy_(factors[0])
    adapter.B.copy_(factors[1])


def _on_quantized_layers(peft_model: PeftModel, adapter_name: str) -> list[tuple[str, Adapter]]:
    """The adapter on every quantized linear layer, with the layer's name."""
    if not isinstance(peft_model, PeftModel):
        raise AdapterError(
            f"replace_lora_weights_loftq takes a PeftModel, found {type(peft_model).__name__}. Put an adapter on the "
            "quantized model with get_peft_model first."
        )
    model = peft_model.get_base_model()
    require_adapters(model, [adapter_name])
    require_unmerged(model, adapter_name, "fitting it to what quantizing lost")
    layers = [(name, layer) for name, layer in peft_model.base_model.lora_layers() if adapter_name in layer.adapters]
    quantized = [(name, layer) for name, layer in layers if layer.is_linear and layer.backend.quantized]
    if not quantized:
        raise TargetError(
            f"Adapter {adapter_name!r} is on no quantized linear layer, so nothing was lost that it could make up for. "
            "Quantize the model first, or make the adapter with init_lora_weights='loftq', which does it."
        )
    for name, layer in quantized:
        _require_plain(name, layer, adapter_name)
    return [(name, layer.adapters[adapter_name]) for name, layer in quantized]


def _require_plain(name: str, layer: LoraLayer, adapter_name: str) -> None:
    adapter = layer.adapters[adapter_name]
    variant = adapter.variant
    found = "a start that was taken from the base" if variant.is_plain_lora else variant.name
    if not variant.is_plain_lora or adapter.start is not None:
        raise AdapterError(
            f"{name}: adapter {adapter_name!r} is no plain LoRA, whose s B A could stand for what quantizing lost: it "
            f"has {found}. Make it anew, with init_lora_weights=True. Nothing was changed."
        )


def _own_name(peft_model: PeftModel) -> str:
    model: nn.Module = peft_model.get_base_model()
    name = name_of(model)
    if name is None:
        raise SourceError(
            f"The {type(model).__name__} does not say where its weights came from. Pass model_path=, a folder or file "
            "with the dense weights."
        )
    return name


def _fitted(peft_model: PeftModel, name: str, adapter: Adapter, weights: BaseWeights) -> tuple[Tensor, Tensor]:
    """A and B for the dense weight of one layer, in their dtypes."""
    layer, config = cast(LoraLayer, adapter.layer), peft_model.peft_config[adapter.name]
    if adapter.scaling == 0:
        raise AdapterError(
            f"{name}: adapter {adapter.name!r} has scaling 0, with which no factors make up for anything. Set another "
            "one (set_scale). Nothing was changed."
        )
    spec = LayerSpec(
        name=name,
        kind=layer.kind,
        rank=adapter.rank,
        scaling=float(adapter.scaling),
        seed=config.seed,
        key=adapter.name,
    )
    codes, stored = layer.base_weight(), weights.read(_names(peft_model, name))
    if stored.shape != codes.shape:
        raise CheckpointError(
            f"{weights.path} has {name}.weight as {shape_text(stored.shape)}, the model as "
            f"{shape_text(codes.shape)}. Name the weights of the model that was quantized. Nothing was changed."
        )
    if not bool(stored.isfinite().all()):
        raise CheckpointError(
            f"{weights.path}: {name}.weight holds nan or inf, which nothing can be fitted to. Fetch or save the file "
            "again. Nothing was changed."
        )
    check_rank(spec, codes)
    weight = stored.to(codes)
    size, lost = torch.linalg.matrix_norm(weight), weight - codes
    if not bool(torch.linalg.matrix_norm(lost) <= _FAR * size):
        raise CheckpointError(
            f"{weights.path}: {name}.weight is not what the layer was quantized from; it differs from the codes by "
            f"more than {_FAR:.0%} of its size. Name the weights of the model that was quantized. Nothing was changed."
        )
    A, B = (factor.to(old) for factor, old in zip(fit(lost, size, spec), (adapter.A, adapter.B), strict=True))
    if not bool(A.isfinite().all() & B.isfinite().all()):
        raise AdapterError(
            f"{name}: the factors fitted for adapter {adapter.name!r} are too large for {A.dtype}; its scaling is "
            f"{adapter.scaling:g}. Set another one (set_scale). Nothing was changed."
        )
    return A, B


def _names(peft_model: PeftModel, name: str) -> list[str]:
    """What the weight of a layer may be called in a file: bare models and those with a head differ by a prefix."""
    prefix = getattr(peft_model.get_base_model(), "base_model_prefix", "")
    others = [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else []
    return [f"{one}.weight" for one in (name, *others)]
