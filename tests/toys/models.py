"""Small models of torch alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two layers with a norm between them; x: (batch, in)."""

    def __init__(self, in_: int = 12, hidden: int = 10, out: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(in_, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.second = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


class Two(nn.Module):
    """Two layers, each time with the same weights; with ``poor`` those of the second are zero. x: (..., in)."""

    def __init__(
        self, in_: int = 12, hidden: int = 10, out: int = 14, *, bias: bool = True, poor: bool = False, seed: int = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(in_, hidden, bias=bias), nn.Linear(hidden, out, bias=bias)
        if poor:
            nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


class Tied(nn.Module):
    """A language model of one table, in float64: for its input and its head, and for a second input if there is one.

    Without ``tied`` every end has a table of its own.
    """

    def __init__(self, *, bias: bool = False, second: bool = False, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.embed = nn.Embedding(10, 6).double()
        self.second = nn.Embedding(10, 6).double() if second else None
        self.proj, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 10, bias=bias).double()
        if tied:
            self.head.weight = self.embed.weight
        if tied and self.second is not None:
            self.second.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(self.embed(x))
        if self.second is not None:
            h = h + self.second(x.flip(0))
        y: Tensor = self.head(torch.tanh(h))
        return y


class Stack(nn.Module):
    """Three experts (E, out, in) = (3, 4, 6) in one parameter, added up, and a router beside them. x: (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 6))
        self.router = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi,be->bo", self.stack, x, self.router(x).softmax(-1))


class Linears(nn.Module):
    """Two linear layers and a head; x: (batch, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x).tanh()).tanh()))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Convolution(nn.Module):
    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = kind(4, 6, 3, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(2).mean(-1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Parameters(nn.Module):
    """Bare parameters: one matrix and two stacks of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 12) / 4)
        self.up = nn.Parameter(torch.randn(3, 12, 18) / 4)
        self.down = nn.Parameter(torch.randn(3, 18, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.matrix.T
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Parameters()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x).tanh())


class Pair(nn.Module):
    """Two square layers, and an embedding that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.embed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.v_proj(self.q_proj(x))
        return y


class Alike(nn.Module):
    """Three stacks of experts of equal shapes, and a layer inside of the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = (nn.Parameter(torch.randn(3, 12, 12) / 6) for _ in range(3))
        self.gate = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(x)
        for stack in (self.up, self.mid, self.down):
            x = torch.einsum("bi,eoi->bo", x, stack).tanh()
        return x


class AlikeMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Alike()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.experts(x))
        return y
