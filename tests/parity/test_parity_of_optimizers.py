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
from lorafa.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from toys.models import Mlp
from toys.optimizers import RANK, batch, loss

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


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW], ids=lambda cls: str(cls.__name__))
def test_ten_riemannian_steps_with_absolute_damping_are_pefts(optimizer_cls: type[torch.optim.Optimizer]) -> None:
    ours, theirs = both(torch.float64)
    settings: dict[str, Any] = {"lr": 1e-2, "reg": 1e-2, "weight_decay": 0.1}
    one = train(
        ours, create_riemannian_optimizer(ours, optimizer_cls, damping="absolute", **settings), 10, torch.float64
    )
    stock = peft.optimizers.create_riemannian_optimizer(theirs, optimizer_cls, **settings)
    other = train(theirs, stock, 10, torch.float64)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-10, msg=name)


class Tokens(nn.Module):
    """A model with layers of both kinds that LoRA+ tells apart, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.first = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(self.norm(self.embed(x)))
        return y


def test_lora_plus_groups_with_fast_vectors_are_pefts() -> None:
    """Rate and decay of every parameter that is trained: factors, biases, the norm beside them."""
    settings: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    settings["loraplus_lr_embedding"] = 1e-5
    found = []
    for library, make, own in (
        (lorafa, create_loraplus_optimizer, {"fast_vectors": True}),
        (peft, peft.optimizers.create_loraplus_optimizer, {}),
    ):
        config = library.LoraConfig(
            r=RANK, target_modules=["embed", "first"], bias="lora_only", modules_to_save=["norm"]
        )
        model = library.get_peft_model(Tokens(), config)
        optimizer = make(model, torch.optim.AdamW, **settings, **own)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found.append({names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]})
        assert len(found[-1]) == 7
    assert found[0] == found[1]
