"""Small models with known gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig
from lorafa.calibration.base import CalibrationOptions, Measured, Statistic
from lorafa.calibration.batches import Asked, Batches
from lorafa.calibration.collect import collect
from lorafa.calibration.gradient import GradientSketch, gradient_triplets
from lorafa.calibration.projections import Projections
from toys.adapters import settings_of


class Toy(nn.Module):
    """Two branches from one input; ``first`` is called twice."""

    def __init__(self, in_: int = 40, hidden: int = 30, out: int = 20, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(in_, hidden, dtype=torch.float64)
        self.second = nn.Linear(in_, hidden, bias=False, dtype=torch.float64)
        self.last = nn.Linear(hidden, out, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        self.to(dtype)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        hidden = torch.relu_(self.first(x)) + self.first(x / 2).sigmoid() * self.second(x)
        y: Tensor = self.last(self.drop(hidden))
        return y


LAYERS = ("first", "second", "last")


def config(start: bool | str = "lora_one", **settings: Any) -> LoraConfig:
    """For the three layers of :class:`Toy`, with what the start does not go without."""
    values = {"r": 2, "lora_alpha": 4, "target_modules": list(LAYERS), "init_seed": 0} | settings_of(start)
    return LoraConfig(**(values | settings))


def inputs(batches: int = 4, rows: int = 6, in_: int = 40, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, rows, in_, generator=generator, dtype=torch.float64).to(dtype) for _ in range(batches)]


def tokens(count: int = 200, in_: int = 20, power: float = 1.0, rank: int | None = None) -> Tensor:
    """Tokens with a mean, and a spectrum i^-power that ends at ``rank``."""
    scale = torch.arange(1, in_ + 1).double() ** -power
    scale[in_ if rank is None else rank :] = 0
    basis = torch.linalg.qr(torch.randn(in_, in_, dtype=torch.float64)).Q
    return (torch.randn(count, in_, dtype=torch.float64) * scale) @ basis + torch.randn(in_) * bool(rank is None)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A mean over the batch."""
    y: Tensor = model(x)
    return (y * y.sin()).mean()


def over(model: nn.Module, data: list[Tensor], weights: list[float] | None = None) -> Batches:
    def run(asked: Asked) -> Iterator[float | None]:
        for index, x in enumerate(data):
            weight = 1.0 if weights is None else weights[index]
            (weight * loss(model, x)).backward()  # type: ignore[no-untyped-call]
            yield weight

    return Batches(run, by_call=weights is None)


def statistics(
    model: nn.Module,
    rank: int = 2,
    kind: Callable[[Measured], Statistic] = GradientSketch,
    name: str = "gradient",
    layers: tuple[str, ...] = LAYERS,
    **options: object,
) -> dict[str, dict[str, Statistic]]:
    chosen = CalibrationOptions(**options)  # type: ignore[arg-type]
    projections = Projections(chosen.seed)
    found = {}
    for layer in layers:
        module = model.get_submodule(layer)
        out, in_ = module.weight.shape
        found[layer] = {name: kind(Measured(layer, out, in_, rank, None, chosen, projections))}
    return found


def collected(
    model: nn.Module, data: list[Tensor], weights: list[float] | None = None, **settings: object
) -> dict[str, dict[str, Tensor]]:
    named = statistics(model, **settings)  # type: ignore[arg-type]
    return collect(model, {name: model.get_submodule(name) for name in named}, named, over(model, data, weights))


def gradients(model: nn.Module, data: list[Tensor], weights: list[float] | None = None) -> dict[str, Tensor]:
    """Autograd's, the (weighted) mean over the batches, without dropout."""
    shares = [1.0] * len(data) if weights is None else weights
    model.eval()
    total = sum(w * loss(model, x) for w, x in zip(shares, data, strict=True)) / sum(shares)
    found = torch.autograd.grad(total, [model.get_submodule(name).weight for name in LAYERS])  # type: ignore[arg-type]
    model.train()
    return dict(zip(LAYERS, found, strict=True))


def gradient_matrix(stats: Mapping[str, Tensor], name: str = "gradient") -> Tensor:
    """The gradient (out, in): itself where it was formed, otherwise the product of its triplets."""
    return stats[f"{name}.dense"] if f"{name}.dense" in stats else gradient_triplets(stats, name).product()
