"""A layer of every kind there is, and the model of that one layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa.backends import BACKENDS
from lorafa.backends.base import Backend
from lorafa.backends.parameter import ParameterBackend

OUT, IN = 24, 8
"""Of every layer here: nn.MultiheadAttention needs out = 3 in, and in must be even for a kernel of two taps."""
PARAMETERS = ("matrix parameter", "experts (E, out, in)", "experts (E, in, out)")
KINDS = (*BACKENDS.names(), *PARAMETERS)


def computed_in(kind: str, dtype: torch.dtype) -> torch.dtype:
    """torchao's weights are in float32 at most, and take inputs of their own dtype only."""
    return torch.float32 if "torchao" in kind and dtype is torch.float64 else dtype


class Experts(nn.Module):
    """x (E, T, in) -> (E, T, out), each expert with its own matrix; x (T, in) for a single matrix."""

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(weight.mT.contiguous() if transposed else weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.is_transposed else self.weight.mT)


class Single(nn.Module):
    """A model of one layer, called as its kind is called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.attends = isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x)[0] if self.attends else self.layer(x)
        return y


def weight_for(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random weight (out, in), or a stack of three."""
    experts = (3,) if kind.startswith("experts") else ()
    return torch.randn(*experts, OUT, IN, dtype=torch.float64).to(computed_in(kind, dtype)) / IN**0.5


def backend_for(kind: str) -> Backend:
    return ParameterBackend("weight") if kind in PARAMETERS else BACKENDS.get(kind)()


def base_layer(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of the kind; skips where its optional package is not installed."""
    weight = weight_for(kind, dtype)
    if kind in PARAMETERS:
        return Experts(weight, transposed=kind == "experts (E, in, out)")
    try:
        return backend_for(kind).example(weight, torch.randn(OUT).to(dtype) if bias else None)
    except ImportError as error:
        pytest.skip(f"{kind}: {error}")


def input_for(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input the layer takes."""
    host = backend_for(kind).host
    if host == "embedding":
        return torch.randint(IN, (5, 7))
    shape = {"linear": (5, 7, IN), "attention": (2, 5, IN), "experts": (3, 5, IN)}.get(host)
    if host == "conv":
        dims = backend_for(kind).dims  # type: ignore[attr-defined]
        shape = (3, IN // 2, 6, *(3,) * (dims - 1))
    if kind == "matrix parameter":
        shape = (5, IN)
    return torch.randn(shape, dtype=torch.float64).to(computed_in(kind, dtype))
