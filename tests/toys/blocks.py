"""A model with one layer of every kind, and what every refusal must leave of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import LoraError
from toys import compare
from toys.adapters import train


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.v_proj(self.q_proj(x).tanh()))


class Model(nn.Module):
    """Two blocks between an embedding and a head; one parameter is frozen already."""

    def __init__(self, depth: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 10)
        self.layers[0].q_proj.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "r": 4} | settings))


@contextmanager
def refused(model: nn.Module, kind: type[LoraError], text: str) -> Iterator[None]:
    """As in toys.compare, with ``text`` as it stands."""
    with compare.refused(model, kind, re.escape(text)):
        yield


def train_model(**settings: Any) -> PeftModel:
    model = get_peft_model(Model(), config(**settings))
    train(model)
    return model
