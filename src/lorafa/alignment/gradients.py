"""Gradients of the parts of the joint loss with respect to the weights, as sketches: nothing of a weight's size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorafa.calibration.base import CalibrationOptions, Measured
from lorafa.calibration.batches import Asked, Batches
from lorafa.calibration.collect import collect
from lorafa.calibration.gradient import GradientSketch
from lorafa.calibration.projections import Projections
from lorafa.errors import ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.surgery.walk import lora_layers

DIRECTIONS = 8
"""Directions that norms are read from."""


@dataclass(frozen=True)
class Watched:
    """A linear layer of which the gradient of the weight is asked for."""

    module: nn.Module
    out: int
    in_: int
    rank: int
    """Directions of the gradient that are wanted."""


class Summed(Protocol):
    """A loss of one batch."""

    def __call__(self, model: nn.Module, number: int) -> tuple[Tensor, int]:
        """The sum over the supervised positions of batch ``number``, and how many they are."""


def trained_linear(model: nn.Module) -> dict[str, Watched]:
    """The linear layers with a trained adapter, or, of a model without adapters, those whose weight is trained.

    Raises:
        ConfigError: there is none.
    """
    adapted = {path: layer for path, layer in lora_layers(model) if layer.is_linear and _trains(layer)}
    found = {path: _watched(layer) for path, layer in adapted.items()}
    if not adapted:
        found = {
            path: Watched(module, module.out_features, module.in_features, DIRECTIONS)
            for path, module in model.named_modules()
            if type(module) is nn.Linear and module.weight.requires_grad
        }
    if not found:
        raise ConfigError(
            "Gradients are measured on linear layers that are trained, and this model trains none. Give the teacher's "
            "weight as a number, and leave align.reorient off."
        )
    return found


def _trains(layer: LoraLayer) -> bool:
    return any(p.requires_grad for name in layer.adapters for p in layer.stored_parameters(name).values())


def _watched(layer: LoraLayer) -> Watched:
    rank = max(adapter.rank for adapter in layer.adapters.values())
    return Watched(layer, layer.out_features, layer.in_features, rank)


def sketched(
    model: nn.Module, layers: Mapping[str, Watched], batches: Sequence[Mapping[str, Any]], loss: Summed
) -> dict[str, dict[str, Tensor]]:
    """Leading triplets and squared norm of the gradient of each layer's weight, of the mean of a loss over positions.

    The model is frozen and without dropout meanwhile. All processes call it, each with its batches, and all get the
    gradient of the mean over all of them.

    Returns:
        Layer -> "gradient.U", "gradient.S", "gradient.Vh", "gradient.norm2" and so on
        (:class:`lorafa.calibration.gradient.GradientSketch`).
    """
    options, projections = CalibrationOptions(), Projections(0)
    statistics = {
        path: {"gradient": GradientSketch(Measured(path, one.out, one.in_, one.rank, None, options, projections))}
        for path, one in layers.items()
    }

    def run(asked: Asked) -> Iterator[float]:
        for number, batch in enumerate(batches):
            asked.note(batch)
            asked.announce(batch)
            with torch.enable_grad():
                total, count = loss(model, number)
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
            yield float(count)

    return collect(model, {path: one.module for path, one in layers.items()}, statistics, Batches(run))


def norms(found: Mapping[str, Mapping[str, Tensor]]) -> list[float]:
    """The norm of each layer's gradient."""
    return [float(one["gradient.norm2"].double().clamp(min=0).sqrt()) for one in found.values()]
