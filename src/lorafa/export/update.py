"""What is exported: the updates of layers as plain LoRA, and what is trained beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.surgery.plain import Lost


@dataclass(frozen=True)
class Update:
    """s B A of one layer, on the pristine base."""

    path: str
    """The layer in the user's model, as files name it: "model.layers.0.self_attn.q_proj"."""
    A: Tensor
    """As files of PEFT store it: (r, in) of linear layers, (r, vocabulary) of tables."""
    B: Tensor
    """(out, r) of linear layers, (dim, r) of tables."""
    scaling: float
    rank: int
    keys: tuple[str, str]
    """What A and B are called below the path."""
    name: str | None = None
    """By which patterns of a config find it; None for what has the numbers of the layer around it."""
    bias: Tensor | None = None
    """The bias of B, (out,), not scaled."""
    is_linear: bool = True
    """Whether the layer computes x W^T + b, so that A and B are matrices of its weight (out, in)."""
    is_table: bool = False
    """Whether it looks up rows, and W is (dim, vocabulary)."""
    what: str = "linear layers"
    """Words for the kind of layer, for errors."""

    @property
    def is_matrix(self) -> bool:
        return self.is_linear or self.is_table

    def with_factors(self, A: Tensor, B: Tensor, scaling: float) -> Update:
        """The same layer with other factors; a linear layer and a table have the rank that A has then."""
        rank = A.shape[0] if self.is_matrix else self.rank
        return Update(
            self.path, A, B, scaling, rank, self.keys, self.name, self.bias, self.is_linear, self.is_table,
            self.what,
        )  # fmt: skip


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter as plain LoRA; nothing of it is on a model."""

    source: str
    """Folder or Hub id it comes from."""
    config: LoraConfig
    """Its layers, and what is trained beside them; ranks and alphas are those of the updates."""
    updates: tuple[Update, ...]
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Copies of modules, rows of tables, biases of the base, tables: key of a file -> tensor."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprint of the base it is for; empty where that is not known."""
    lost: Lost | None = None
    """What was lost of the updates, where they were given another rank."""

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(update.rank for update in self.updates)


def relative_error(one: Update, other: Update) -> float:
    """||s B A - s' B' A'||_F / ||s B A||_F of two updates of one layer, in float64, without forming the products.

    Of layers whose factors are no matrices that of A and s B as they are stored, where both have the same shapes.
    """
    if not one.is_matrix:
        pairs = [(one.A, other.A), (one.scaling * one.B.double(), other.scaling * other.B.double())]
        if any(a.shape != b.shape for a, b in pairs):
            return float("inf")
        return max(_relative(a.double(), b.double()) for a, b in pairs)
    if one.A.shape[1] != other.A.shape[1] or one.B.shape[0] != other.B.shape[0]:
        return float("inf")
    A = torch.cat([one.A.double(), other.A.double()])
    B = torch.cat([one.scaling * one.B.double(), -other.scaling * other.B.double()], dim=1)
    size = _norm(one.A.double(), one.scaling * one.B.double())
    difference = _norm(A, B)
    return difference / size if size else difference


def _norm(A: Tensor, B: Tensor) -> float:
    """||B A||_F: with A^T = Q R it is that of B R^T, which is small and of which nothing is squared."""
    R = torch.linalg.qr(A.mT, mode="r").R
    return float(torch.linalg.matrix_norm(B @ R.mT))


def _relative(a: Tensor, b: Tensor) -> float:
    size = float(a.norm())
    return float((a - b).norm()) / size if size else float((a - b).norm())
