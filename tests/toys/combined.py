"""Models with several trained adapters, and what their combinations must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.surgery.walk import lora_layers
from toys.adapters import adapted, config_for, train

FACTOR_TYPES = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
SVD_TYPES = ("svd", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")


def density_for(kind: str, density: float = 0.5) -> dict[str, float]:
    """The density, for the types that read one."""
    return {"density": density} if kind not in ("svd", "cat", "linear") else {}


def two_on(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """A model of one layer of the kind with a trained adapter "default" of these settings and a trained "other", of
    another rank, alpha and scaling rule; the other one counts."""
    model = adapted(kind, dtype=dtype, **settings)
    model.add_adapter("other", config_for(kind, r=3, lora_alpha=5, use_rslora=True))
    model.set_adapter("other")
    train(model)
    return model


def several(base: nn.Module, **configs: LoraConfig) -> PeftModel:
    """The model with these adapters on it, all of them trained; the last one counts."""
    (first, config), *others = configs.items()
    model = get_peft_model(base, config, first)
    train(model)
    for name, config in others:
        model.add_adapter(name, config)
        model.set_adapter(name)
        train(model)
    return model.eval()


@torch.no_grad()
def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """The update of an adapter by the path of its layers, each a matrix or a stack of them."""
    found = ((path, layer) for path, layer in lora_layers(model.get_base_model()) if name in layer.adapters)
    return {path: layer.adapters[name].delta_weight(layer.base_weight()) for path, layer in found}


def weighted(model: PeftModel, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """sum w_i Delta_i by the path of the layers."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(model, name).items():
            total[path] = total[path] + weight * delta if path in total else weight * delta
    return total


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The norm of the difference over that of what is wanted, over all layers."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[path] - wanted[path]).double().square().sum()) for path in wanted)
    return float((apart / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5)
