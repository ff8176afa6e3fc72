"""Adapters merged into a quantized model that becomes a dense one: the function that was trained, rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.errors import AdapterError, BackendError, ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.settings.checks import found
from lorafa.surgery.activate import require_adapters, require_uniform
from lorafa.surgery.walk import Parents, lora_layers, user_model

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")
"""What transformers leaves on a model that it has quantized, so that it saves codes."""


@dataclass(frozen=True)
class Lost:
    """How far a merged weight is from the sum it stands for; norms over all adapted layers that were quantized."""

    layers: int
    dtype: str
    """The number format of the dense weights."""
    update: float
    """What the adapters add, as a share of the merged weights."""
    rounded: float
    """What rounding to the dtype has lost, as a share of them."""
    requantized: float
    """What rounding to the codes of the layers would have lost, as a share of them."""

    def in_words(self) -> str:
        return (
            f"Merged into dense weights ({self.dtype}): the update is {self.update:.2%} of {self.layers} weights, "
            f"rounding lost {self.rounded:.3%}; as codes again they would have lost {self.requantized:.2%}."
        )


def has_codes(model: nn.Module) -> bool:
    """Whether a layer of the model is quantized."""
    return any(_is_quantized(module) for module in model.modules())


@torch.no_grad()
def merge_into_dense(
    model: Any, dtype: torch.dtype | None = None, adapter_names: Sequence[str] | None = None
) -> tuple[nn.Module, Lost]:
    """``merge_and_unload`` for a quantized base: every quantized linear layer becomes an ``nn.Linear``.

    The merged weight is the dequantized one plus the updates, summed in float32 and rounded to ``dtype`` once. To round
    it to codes again, as ``merge_and_unload`` does, loses more than a small update is.

    Args:
        model: a PeftModel; the adapters are off it afterwards.
        dtype: of the dense weights; None: that of the model.
        adapter_names: those to fold in; None: the active ones.

    Returns:
        The model, dense, and what was lost.

    Raises:
        ConfigError: no layer of the model is quantized, or ``dtype`` is no floating-point one.
        AdapterError, BackendError: as ``merge_and_unload``, or ``model`` is no PeftModel; the model is as it was.
    """
    if not callable(getattr(model, "merge_and_unload", None)):
        raise AdapterError(
            f"merge_into_dense takes the PeftModel whose adapters are to be merged, found {found(model)}. Pass what "
            "get_peft_model returned; for a model without adapters, load it dense."
        )
    if not has_codes(model):
        raise ConfigError("No layer of this model is quantized, so merge_and_unload() makes the same of it. Call that.")
    wanted = _dtype_of(model) if dtype is None else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point or wanted.itemsize < 2:
        raise ConfigError(f"Dense weights cannot be {wanted!r}. Pass torch.bfloat16, float16 or float32.")
    if adapter_names is not None:
        require_adapters(model, adapter_names)
    names = [name for _, layer in lora_layers(model) for name in layer.mergeable(adapter_names)]
    require_uniform(model, [*dict.fromkeys(names)], "Merging")
    changed: list[LoraLayer] = []
    sums = [0.0] * 4
    before = [(layer, layer.base_layer, layer._pristine, layer.merged_adapters) for _, layer in lora_layers(model)]
    try:
        for path, layer in lora_layers(model):
            if layer.backend.quantized:
                names = layer.mergeable(adapter_names)
                dense, own = _dense(path, layer, names, wanted)
                layer.put_merged(dense, names)
                changed.append(layer)
                sums = [one + other for one, other in zip(sums, own, strict=True)]
        merged: nn.Module = model.merge_and_unload(adapter_names=None if adapter_names is None else [*adapter_names])
    except BaseException:
        for layer, base, pristine, names in before:
            layer.base_layer, layer._pristine, layer.merged_adapters = base, pristine, names
        raise
    parents = Parents(merged)
    for module in [*merged.modules()]:
        if _is_quantized(module):
            parents.replace(module, _linear(module, _backend(module).weight(module), None, wanted))
    _forget_codes(merged)
    size = sums[0]
    shares = [math.sqrt(one / size) if size else 0.0 for one in sums[1:]]
    return merged, Lost(len(changed), str(wanted).removeprefix("torch."), *shares)


def _dense(
    path: str, layer: LoraLayer, names: Sequence[str], dtype: torch.dtype
) -> tuple[nn.Module, tuple[float, float, float, float]]:
    """The dense layer with the updates, and squared norms: of its weight, of the update, and of what two ways of
    rounding lose."""
    pristine, backend = layer.pristine, layer.backend
    try:
        total, before = layer.merged_weight(names), layer.base_weight()
        bias = layer.updated_bias([layer.adapters[name] for name in names])
    except BackendError as error:
        raise BackendError(f"{path}: {error}") from error
    new = _linear(pristine, total, bias, dtype)
    if not bool(new.weight.isfinite().all()):
        raise AdapterError(
            f"{path}: merging {', '.join(map(repr, names))} gives inf or nan in {dtype}; nothing was merged. The "
            "adapter was probably trained to divergence, or the model needs a dtype of wider range: bfloat16 or "
            "float32."
        )
    again = backend.weight(backend.with_weight(pristine, total))
    return new, (_square(total), _square(total - before), _square(new.weight - total), _square(again - total))


def _square(difference: Tensor) -> float:
    return float(difference.square().sum(dtype=torch.float64))


def _linear(old: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """An ordinary layer with a weight (out, in) in ``dtype``; with the bias of ``old`` where None is given."""
    out, in_ = weight.shape
    kept = _backend(old).bias(old) if bias is None else bias
    new = nn.Linear(in_, out, bias=kept is not None, device="meta")
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if kept is not None:
        new.bias = nn.Parameter(kept.detach().to(dtype), requires_grad=False)
    return new.train(old.training)


def _backend(module: nn.Module) -> Any:
    return backend_of(module)


def _is_quantized(module: nn.Module) -> bool:
    backend = None if isinstance(module, LoraLayer) else backend_of(module)
    return backend is not None and backend.quantized and backend.serves(module) is None


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the user's model where it says one, else of most of its own numbers."""
    said = getattr(user_model(model), "dtype", None)
    return said if isinstance(said, torch.dtype) and said.is_floating_point and said.itemsize > 1 else torch.float32


def _forget_codes(model: nn.Module) -> None:
    """Let transformers save the model as an ordinary one."""
    for name in _MARKS:
        vars(model).pop(name, None)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # type: ignore[union-attr]
