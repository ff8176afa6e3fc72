"""What became of a combination of adapters: layer by layer what was asked for, and how much of it is not there."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerError:
    """How far the combination on one layer is from what its type asks for, before it is rounded to its dtype."""

    rank: int
    energy: float
    """The squared Frobenius norm of what is asked for. For "cat", "svd" and "linear" that is sum w_i Delta_i, for the
    other types that end in "svd" the pruned and merged matrix, for the rest the product of the merged factors."""
    lost: float | None
    """The energy of the difference; None for the types that prune A and B: there the factors are what is asked for."""

    @property
    def relative(self) -> float | None:
        """The norm of the difference over that of what is asked for."""
        return None if self.lost is None else (math.sqrt(self.lost / self.energy) if self.energy else 0.0)


@dataclass(frozen=True)
class Combination:
    """What became of a combination of adapters."""

    adapter_name: str
    combination_type: str
    layers: Mapping[str, LayerError]
    """By the full name of a layer, or of a parameter."""

    @property
    def energy(self) -> float:
        return sum(layer.energy for layer in self.layers.values())

    @property
    def lost(self) -> float | None:
        """The energy that the combination does not have, over all layers; None where nothing is asked for."""
        found = [layer.lost for layer in self.layers.values()]
        return None if None in found else sum(lost for lost in found if lost is not None)

    @property
    def relative(self) -> float | None:
        """The norm of the difference over that of what is asked for, over all layers."""
        return LayerError(0, self.energy, self.lost).relative

    def worst(self, count: int = 3) -> list[tuple[str, LayerError]]:
        """The layers that lost the largest share, the worst first."""
        known = [(name, layer) for name, layer in self.layers.items() if layer.relative is not None]
        return sorted(known, key=lambda item: -(item[1].relative or 0.0))[:count]

    def __str__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers.values()})
        of = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = f"{self.adapter_name}: {self.combination_type} on {len(self.layers)} layers, {of}"
        if self.relative is None:
            return f"{text}; the factors are merged as tensors, so there is no matrix to compare with"
        if not self.lost:
            return f"{text}; nothing of what was asked for is lost"
        worst = "".join(f"{layer.relative:.2%} on {name}" for name, layer in self.worst(1))
        return f"{text}; error {self.relative:.2%} of the norm over all layers, at most {worst}"

    def log(self) -> None:
        """Say it to the logger "lorafa"."""
        logging.getLogger("lorafa").info("%s", self)
