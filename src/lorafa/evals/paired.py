"""Two models on the same items: their difference, with an interval that the items' own spread does not widen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafa.errors import DataError
from lorafa.evals.entry import Measured
from lorafa.evals.intervals import normal_point


def mean_interval(measured: Measured) -> tuple[float, float, float]:
    """The mean over the items with the bounds of its 95 % interval, by the normal approximation.

    With weights the mean is a ratio of two sums; its variance is that of the residuals (Cochran 1977, Sampling
    Techniques, 6.3). A single item has no spread: its bounds are infinite.
    """
    return _around(measured, normal_point())


def paired_difference(one: Measured, other: Measured, comparisons: int = 1) -> tuple[float, float, float]:
    """``one`` minus ``other`` on the same items, with the bounds of its 95 % interval.

    Args:
        comparisons: how many models are compared with ``other``. Each interval is made so wide that all of them hold
            together with 95 %, as those of `lorafa compare` do.

    Raises:
        DataError: they are not of the same items, or weigh them differently.
    """
    weights = None if one.weights is None else list(one.weights)
    others = None if other.weights is None else list(other.weights)
    if len(one.values) != len(other.values) or one.name != other.name or weights != others:
        raise DataError(
            f"The scores {one.name} of {len(one.values)} items and {other.name} of {len(other.values)} cannot be "
            "compared pair by pair: the items, or how much each counts, differ. Two tokenizers cut a text into other "
            "tokens: compare such models by bits_per_byte."
        )
    differences = [a - b for a, b in zip(one.values, other.values, strict=True)]
    if one.weights is None and {*one.values, *other.values} <= {0.0, 1.0}:
        return _of_proportions(differences, normal_point(comparisons))
    return _around(Measured(one.name, differences, one.weights), normal_point(comparisons))


def _around(measured: Measured, point: float) -> tuple[float, float, float]:
    mean = measured.mean()
    half = point * _standard_error([value - mean for value in measured.values], measured.weights)
    return mean, mean - half, mean + half


def _of_proportions(differences: Sequence[float], point: float) -> tuple[float, float, float]:
    """The difference of two shares of the same items, with Agresti and Min's interval (2005, Statistics in Medicine
    24:729): half an item is added to each of the four ways in which a pair can come out, so that few items on which
    both agree are no certainty."""
    count, gained, lost = len(differences) + 2, differences.count(1.0) + 0.5, differences.count(-1.0) + 0.5
    middle = (gained - lost) / count
    half = point * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    return sum(differences) / len(differences), max(-1.0, middle - half), min(1.0, middle + half)


def _standard_error(residuals: Sequence[float], weights: Sequence[float] | None) -> float:
    count = len(residuals)
    if count < 2:
        return math.inf
    weighed = weights or [1.0] * count
    squares = sum((w * r) ** 2 for w, r in zip(weighed, residuals, strict=True))
    return math.sqrt(count / (count - 1) * squares) / sum(weighed)
