"""Small adapted models in float64 for the tests of the optimizers, and dense gradients to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.optimizers.pairs import Pair, pairs_of
from toys.models import Mlp

IN, HIDDEN, OUT, RANK = 12, 10, 7, 3


def adapted(dtype: torch.dtype = torch.float64, model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """A model whose A and B are both random, so that nothing is zero by accident."""
    settings = {"r": RANK, "lora_alpha": 5.0, "target_modules": ["first", "second"]} | settings
    made = get_peft_model((Mlp(IN, HIDDEN, OUT) if model is None else model).to(dtype), LoraConfig(**settings))
    with torch.no_grad():
        for pair in pairs_of(made):
            pair.A.copy_(torch.randn_like(pair.A))
            pair.B.copy_(torch.randn_like(pair.B) * 0.3)
    return made


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(16, IN, dtype=dtype), torch.randn(16, OUT, dtype=dtype)


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, target = data
    return ((model(x) - target) ** 2).mean()


def weight_gradients(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradient G (out, in) of every adapted weight, by the layer's name."""
    pairs = pairs_of(model)
    weights = {pair.path: pair.layer.get_base_layer().weight for pair in pairs}
    for weight in weights.values():
        weight.requires_grad_(True)  # type: ignore[operator]
    loss(model, data).backward()
    found = {path: weight.grad.clone() for path, weight in weights.items()}  # type: ignore[union-attr, operator]
    for weight in weights.values():
        weight.requires_grad_(False)  # type: ignore[operator]
        weight.grad = None  # type: ignore[assignment]
    return found


def update(pair: Pair) -> Tensor:
    """s B A, (out, in)."""
    return (pair.scaling * pair.adapter.B @ pair.adapter.A).detach().clone()


def row_projector(A: Tensor) -> Tensor:
    """A^T (A A^T)^-1 A, by way of a QR decomposition."""
    Q, _ = torch.linalg.qr(A.detach().mT)
    return Q @ Q.mT
