"""Steps of our optimizers against PEFT's, on the same model and data."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import peft.optimizers
import peft.optimizers.lorafa
import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa.optimizers import create_lorafa_optimizer
from optimizer_toys import RANK, Mlp, batch, loss

SETTINGS: dict[str, Any] = {"r": RANK, "lora_alpha": 5, "target_modules": ["first", "second"]}


def both(dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same adapted model in both libraries, random factors."""
    models = []
    for library in (lorafa, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(Mlp().to(dtype), library.LoraConfig(**SETTINGS, **settings))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        models.append(model)
    return models[0], models[1]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch(dtype)).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-7)], ids=str)
def test_thirty_steps_of_lora_fa_are_pefts_without_its_bfloat16(
    monkeypatch: pytest.MonkeyPatch, weight_decay: float, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    ours, theirs = both(dtype)
    arguments: dict[str, Any] = {"r": RANK, "lora_alpha": 5, "lr": 1e-3, "weight_decay": weight_decay}
    one = train(ours, create_lorafa_optimizer(ours, **arguments), 30, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = train(theirs, peft.optimizers.create_lorafa_optimizer(theirs, **arguments), 30, dtype)
    for name, value in one.items():
        if "lora_B" in name:
            error = float((value - other[name]).norm() / other[name].norm())
            assert error < tolerance, (name, error)
