"""Small models in float64 with adapters that have left their start, for exchanging one for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.surgery.walk import lora_layers
from toys.adapters import train
from toys.models import Linears

BOTH = {"target_modules": ["first", "second"]}


def base(kind: Callable[[], nn.Module] = Linears) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def adapted(kind: Callable[[], nn.Module] = Linears, seed: int = 1, **settings: Any) -> PeftModel:
    model = get_peft_model(base(kind), LoraConfig(**(BOTH | {"r": 4, "lora_alpha": 6} | settings)))
    torch.manual_seed(seed)
    train(model)
    return model.eval()


def saved(folder: Path, kind: Callable[[], nn.Module] = Linears, seed: int = 2, **settings: Any) -> Path:
    adapted(kind, seed, **settings).save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: Callable[[], nn.Module] = Linears) -> PeftModel:
    return PeftModel.from_pretrained(base(kind), folder)


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def numbers(model: nn.Module) -> dict[str, Any]:
    """What an adapter owns beside its tensors."""
    return {
        path: [(a.rank, a.alpha, float(a.scaling), a.use_rslora, a.trains, a.is_empty, a.slots) for a in adapters]
        for path, adapters in ((path, layer.adapters.values()) for path, layer in lora_layers(model))
    }
