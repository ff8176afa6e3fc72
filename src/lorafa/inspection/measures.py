"""Numbers of the update of one layer: norms, spectrum, ranks; and how like another one it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.errors import CheckpointError
from lorafa.inspection.updates import LayerUpdate
from lorafa.numerics.low_rank import effective_rank, product_inner, product_values, stable_rank, subspace_similarity


@dataclass(frozen=True)
class Measured:
    """What is measured of the update D of one layer; a stack of experts is one block-diagonal matrix."""

    values: list[float]
    """All its singular values that the factors leave room for, falling."""
    frobenius: float
    """||D||_F."""
    spectral: float
    """||D||_2, the largest singular value."""
    effective_rank: float
    """exp of the entropy of sigma^2 / sum sigma^2 (:func:`lorafa.numerics.low_rank.effective_rank`)."""
    stable_rank: float
    """||D||_F^2 / ||D||_2^2."""

    @property
    def energy(self) -> float:
        """||D||_F^2."""
        return self.frobenius**2


def measured(update: LayerUpdate) -> Measured:
    """The numbers of s B A, through the factors."""
    return of_values(abs(update.scaling) * product_values(update.A, update.B))


def of_values(values: Tensor) -> Measured:
    """The numbers of a matrix with these singular values, (k,) or (E, k)."""
    falling = values.flatten().sort(descending=True).values
    return Measured(
        falling.tolist(),
        float(torch.linalg.vector_norm(falling)),
        float(falling[0]),
        float(effective_rank(falling)),
        float(stable_rank(falling)),
    )


@dataclass(frozen=True)
class Likeness:
    """How like the updates of one layer in two adapters are."""

    cosine: float | None
    """<D1, D2> / (||D1||_F ||D2||_F); None where one of them is zero."""
    rows: float
    """phi of the row spaces of A (:func:`lorafa.numerics.low_rank.subspace_similarity`); of a stack the mean."""
    columns: float
    """phi of the column spaces of B."""


def likeness(one: LayerUpdate, other: LayerUpdate) -> Likeness:
    """The angle between s1 B1 A1 and s2 B2 A2, and the parts that their spaces share.

    Raises:
        CheckpointError: the two are of layers of different shapes.
    """
    if one.shape != other.shape:
        raise CheckpointError(
            f"{one.name!r} is {_text(one.shape)} in one adapter and {_text(other.shape)} in the other: they were made "
            "for different base models, and have no directions in common. Compare adapters of one base."
        )
    rows = subspace_similarity(one.A.mT, other.A.mT)
    return Likeness(cosine_of([(one, other)]), float(rows.mean()), float(subspace_similarity(one.B, other.B).mean()))


def cosine_of(pairs: Iterable[tuple[LayerUpdate, LayerUpdate]]) -> float | None:
    """The cosine of the updates of several layers as one vector; None where one side is zero."""
    inner = [0.0, 0.0, 0.0]
    for one, other in pairs:
        for place, (first, second) in enumerate(((one, other), (one, one), (other, other))):
            product = product_inner(first.A, first.B, second.A, second.B).sum()
            inner[place] += float(product) * first.scaling * second.scaling
    size = math.sqrt(max(inner[1], 0) * max(inner[2], 0))
    return max(-1.0, min(1.0, inner[0] / size)) if size > 0 else None


def shares(measures: Sequence[Measured]) -> list[float]:
    """Each layer's share of the energy of all."""
    whole = math.fsum(one.energy for one in measures)
    return [one.energy / whole if whole else 0.0 for one in measures]


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
