"""The linear layers of a base model quantized when it is loaded (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.errors import ConfigError
from lorafa.models import QUANTIZERS


@dataclass(frozen=True)
class Quantized:
    """What was quantized, and what that lost."""

    way: str
    """A line of ``QUANTIZERS``."""
    layers: int
    weights: int
    """Numbers of these layers' weights."""
    all: int
    """Numbers of all weights of the model."""
    off: float
    """The norm of what was lost, as a share of that of these weights."""

    def in_words(self) -> str:
        share = self.weights / self.all
        return (
            f"Quantized as {self.way}: {self.layers} linear layers with {share:.0%} of the weights, which are off by "
            f"{self.off:.2%}."
        )


@torch.no_grad()
def quantize_linears(
    model: nn.Module, way: str, whole: Iterable[str] = (), setting: str = "model.quantize"
) -> Quantized:
    """Put quantized layers in the place of a model's dense linear ones, one after another, on the devices they are on.

    Left as they are: what lies outside of the model's body, such as the head; layers whose weight another module has
    too; modules called ``whole``, with what is inside them; and those that the model's class keeps in float32, whose
    weights its code looks at (T5's ``wo``).

    Args:
        model: a model of transformers, changed in place.
        way: a line of ``QUANTIZERS``.
        whole: names of modules, or the last parts of them, as in ``modules_to_save``.
        setting: what errors call the way.

    Raises:
        ConfigError: the package that the way needs is not installed, there is nothing to quantize, or a weight holds
            nan or inf.
    """
    make, layers = QUANTIZERS.get(way), list(_linears(model, (*whole, *_kept_in_float32(model))))
    everything = sum(p.numel() for p in model.parameters())
    if not layers:
        raise ConfigError(
            f"{setting}={way} quantizes linear layers, and this {type(model).__name__} has none of its own that "
            "could be. Leave it out."
        )
    count, lost, size = 0, 0.0, 0.0
    for parent, name, path in layers:
        old = getattr(parent, name)
        weight, bias = _dense_of(old)
        if not bool(weight.isfinite().all()):
            raise ConfigError(
                f"{setting}={way} cannot quantize {path}: its weight holds nan or inf, and codes would spread it "
                "over the block or row. Load weights that are finite."
            )
        try:
            new = make(weight, bias)
        except ImportError as error:
            package = (error.name or str(error)).partition(".")[0]
            raise ConfigError(
                f"{setting}={way} cannot quantize {path}: it needs {package}, which is not installed. Install it "
                f"(pip install {package}), or set {setting}=nf4 or int8, which need nothing."
            ) from error
        backend = backend_of(new)
        if backend is None or not backend.quantized:
            raise ConfigError(
                f"{setting}={way} makes a {type(new).__name__} of {path}, which no back end knows as quantized. "
                "Register one for it."
            )
        values = weight.float()
        count += values.numel()
        size += float(values.square().sum(dtype=torch.float64))
        lost += float((backend.weight(new).float() - values).square().sum(dtype=torch.float64))
        if new.bias is not None:
            new.bias.requires_grad_(False)
        setattr(parent, name, new.train(old.training))
    return Quantized(way, len(layers), count, everything, math.sqrt(lost / size) if size else 0.0)


def _kept_in_float32(model: nn.Module) -> set[str]:
    """Names of modules that a model of transformers keeps in float32 whatever it is loaded in."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {kept for name in names for kept in getattr(model, name, None) or ()}


def _dense_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in) and the bias of a dense linear layer, whatever way round it stores the weight."""
    dense = cast(Backend, backend_of(layer)).dense(layer)
    return cast("tuple[Tensor, Tensor | None]", dense)


def _linears(model: nn.Module, whole: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, name, path) of every dense linear layer that may be quantized."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    inside = model if not isinstance(body, nn.Module) else body
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    named = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    holders = Counter(id(p) for m in {*model.modules()} for p in m._parameters.values() if p is not None)
    parents = [(parent, name, child) for parent in inside.modules() for name, child in parent.named_children()]
    seen = Counter(id(child) for _, _, child in parents)
    for parent, name, child in parents:
        path, backend = named[id(child)], backend_of(child)
        if child is head or seen[id(child)] > 1 or backend is None:
            continue
        if backend.dense(child) is None or "weight" not in child._parameters or holders[id(child.weight)] > 1:
            continue
        if not any(f".{path}.".find(f".{one}.") >= 0 for one in whole):
            yield parent, name, path
