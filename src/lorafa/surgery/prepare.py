"""Getting a quantized model ready for training, as scripts written for PEFT do before they put an adapter on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorafa.backends import backend_of
from lorafa.surgery.forward import let_inputs_require_grad
from lorafa.surgery.walk import base_parameters, require_module

_HALVES = (torch.float16, torch.bfloat16)
_SAYS_QUANTIZED = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a model, keep in float32 what of it is not quantized, and checkpoint its activations if it is quantized.

    Args:
        model: changed in place, and returned. Parameters in float16 and bfloat16 (norms, embeddings, head) become
            float32, which takes twice their memory; quantized ones stay as they are. Layers of bitsandbytes are kept
            from packing their codes for inference, which some CPUs have them do in eval mode.
        use_gradient_checkpointing: recompute activations in backward; of a quantized model of transformers only, as in
            PEFT.
        gradient_checkpointing_kwargs: for the model's ``gradient_checkpointing_enable``.
        auto_clear_cache: give the memory of the halves back to the device.
    """
    require_module(model).requires_grad_(False)
    for _, parameter in base_parameters(model):
        if parameter.dtype in _HALVES and type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor:
            parameter.data = parameter.data.to(torch.float32)
    for module in model.modules():
        if (backend := backend_of(module)) is not None:
            backend.prepare(module)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing and _is_quantized(model) and hasattr(model, "gradient_checkpointing_enable"):
        given = (
            {}
            if gradient_checkpointing_kwargs is None
            else {"gradient_checkpointing_kwargs": dict(gradient_checkpointing_kwargs)}
        )
        enable: Any = model.gradient_checkpointing_enable
        enable(**given)
        let_inputs_require_grad(model)
    return model


def _is_quantized(model: nn.Module) -> bool:
    if any(getattr(model, name, False) for name in _SAYS_QUANTIZED):
        return True
    backends = (backend_of(module) for module in model.modules())
    return any(backend is not None and backend.quantized for backend in backends)
