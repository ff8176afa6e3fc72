"""Models whose weights are taken away and brought in by hooks of accelerate, beside the same models in memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import DEFINED, VARIANT, config_for, only_layer, read_by, starts_of, stats_for, train
from toys.layers import Single, backend_for, base_layer, weight_for

accelerate = pytest.importorskip("accelerate")
CALLED = [
    (v, k) for v, k in DEFINED if backend_for(k).host in ("linear", "conv", "embedding") and backend_for(k).can_rest
]
"""(variant, kind of layer) that have a product with the layer's input, and whose weights hooks can bring in."""
WITH_STARTS = [(v, k, start) for v, k in CALLED for start in starts_of(v, False, "pissa")]
CALLED_KINDS = list(dict.fromkeys(kind for _, kind in CALLED))
Offload = Callable[[nn.Module], nn.Module]
WHERE = ("memory", "memory with buffers", "disk")
_numbers = itertools.count()


def offloading(where: str, folder: Path) -> Offload:
    """What takes the weights of a model away: to main memory, or to files in ``folder``."""

    def away(model: nn.Module) -> nn.Module:
        if where == "disk":
            accelerate.disk_offload(model, str(folder / f"weights {next(_numbers)}"), torch.device("cpu"))
        else:
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers="buffers" in where)
        return model

    return away


def in_memory(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


def settings_for(variant: str, start: bool | str) -> dict[str, Any]:
    return VARIANT[variant] | {"init_lora_weights": start}


def pair(kind: str, offload: Offload, **settings: Any) -> tuple[PeftModel, PeftModel]:
    """The same adapter on the same base, in memory and offloaded."""
    base = Single(base_layer(kind, dtype=torch.float32))
    models = []
    for model in (copy.deepcopy(base), offload(copy.deepcopy(base))):
        config, stats = config_for(kind, **settings), {"layer": stats_for(weight_for(kind))}
        models.append(get_peft_model(model, config, stats=read_by(config.init_lora_weights, stats)))
        torch.manual_seed(1)
        train(models[-1])
    return models[0], models[1]


def rests(model: PeftModel) -> bool:
    return any(p.is_meta for p in only_layer(model).get_base_layer().parameters())


def ran(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y: Tensor = model(x)
    y.sin().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Net(nn.Module):
    """A small language model."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=not tied)
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(self.embed(x))))
        return y


X = torch.tensor([[1, 3, 3], [9, 0, 7]])
BESIDE: dict[str, dict[str, Any]] = {
    "copy": {"modules_to_save": ["head"]},
    "rows of the embedding": {"trainable_token_indices": {"embed": [3, 7]}},
    "rows of the head": {"trainable_token_indices": {"head": [3, 7]}},
    "embedding and head": {"target_modules": ["embed", "body", "head"]},
}


def nets(offload: Offload, *, tied: bool = False, **settings: Any) -> list[PeftModel]:
    models, config = [], LoraConfig(**({"target_modules": ["body"], "r": 2, "init_seed": 3} | settings))
    for model in (Net(tied=tied), offload(Net(tied=tied))):
        models.append(get_peft_model(model, config))
        torch.manual_seed(1)
        train(models[-1])
    return models
