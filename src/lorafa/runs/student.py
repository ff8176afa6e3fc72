"""Student's t: its distribution, its quantiles, and the intervals of means that follow.

The distribution is the regularized incomplete beta function, computed by its continued fraction (Abramowitz and Stegun
26.5.8 and 26.7.1); a quantile is found by bisection. Agrees with printed tables to all their digits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lorafa.evals.intervals import upper_end

_TINY, _CLOSE, _TERMS = 1e-300, 1e-15, 10_000


def cdf(t: float, freedom: float) -> float:
    """The probability that Student's t with ``freedom`` degrees of freedom is at most ``t``."""
    square = t * t
    if square < freedom:  # the side on which nothing is lost to rounding
        inside = incomplete_beta(0.5, freedom / 2, square / (freedom + square))
        return 0.5 + math.copysign(inside / 2, t)
    tail = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square)) / 2
    return 1 - tail if t > 0 else tail


def quantile(probability: float, freedom: float) -> float:
    """The t that Student's t with ``freedom`` > 0 degrees of freedom exceeds with 1 - ``probability``, in (0, 1).

    Raises:
        ValueError: a probability that has no quantile, or no degree of freedom.
    """
    if not (0 < probability < 1 and freedom > 0):
        raise ValueError(f"A quantile needs 0 < probability < 1 and freedom > 0, found {probability} and {freedom}.")
    tail = min(probability, 1 - probability)  # of the lower side, where a small tail keeps its digits
    if tail == 0.5:
        return 0.0
    low, high = -1.0, 0.0
    while cdf(low, freedom) > tail:
        low, high = low * 2, low
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if cdf(middle, freedom) > tail else (middle, high)
    return middle if probability < 0.5 else -middle


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularized incomplete beta function, for a, b > 0 and x in [0, 1]."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction would converge slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / a * _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b) by Lentz's method."""
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / _away_from_zero(1 + numerator * d)
            c = _away_from_zero(1 + numerator / c)
            value *= c * d
        if abs(c * d - 1) < _CLOSE:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def interval(values: Sequence[float], comparisons: int = 1) -> dict[str, Any]:
    """Mean and half the width of its 95 % interval; the half is None with a single value, the whole empty with none.

    Args:
        comparisons: how many such intervals stand in one table. Each is made so wide that all of them together hold
            what they should with 95 % (Bonferroni: Student's t at 1 - 0.05 / (2 comparisons)), whatever the values
            have in common.
    """
    if not values:
        return {}
    half = None
    if len(values) > 1:
        t = quantile(upper_end(comparisons), len(values) - 1)
        half = t * statistics.stdev(values) / math.sqrt(len(values))
    found = {"mean": statistics.mean(values), "half_width": half, "values": list(values)}
    return found if comparisons == 1 else {**found, "comparisons": comparisons}
