"""A model of three layers with three adapters, for the tests of PeftModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import train


class Model(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BASE = Model().double()


def config(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(targets or ("first", "second")), **({"r": 2} | settings))


def three() -> PeftModel:
    """Adapters a (both layers, and the head in full), b (first) and c (second); a is active."""
    model = get_peft_model(Model().double(), config(modules_to_save=["head"]), "a")
    model.add_adapter("b", config("first", lora_alpha=5))
    model.add_adapter("c", config("second", r=3))
    for name in ("c", "b", "a"):
        model.set_adapter(name)
        train(model)
    return model.eval()


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names_of(model: nn.Module, adapter: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if f".{adapter}." in name}


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(X)
