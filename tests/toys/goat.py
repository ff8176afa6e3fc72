"""A layer whose experts a router sends its tokens to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import train

E, D, R, IN, OUT, ALPHA = 4, 2, 8, 12, 10, 6.0


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(IN, OUT, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def config(targets: tuple[str, ...] = ("layer",), experts: int = E, r: int = R, **settings: Any) -> LoraConfig:
    own = {key: settings.pop(key) for key in ("top_k", "scaling", "balance", "last") if key in settings}
    return LoraConfig(
        r=r, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights="goat", init_seed=1,
        init_config={"experts": experts, **own}, **settings,
    )  # fmt: skip


def adapted(*, trained: bool = True, **settings: Any) -> PeftModel:
    model = get_peft_model(One(), config(**settings))
    if trained:
        torch.manual_seed(2)
        train(model)
    return model


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 5)), IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
