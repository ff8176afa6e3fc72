"""How sure an interval is, of a single figure or of several that stand together."""

from __future__ import annotations

from statistics import NormalDist

LEVEL = 0.95
"""How often all intervals that stand together hold at once."""


def upper_end(comparisons: int = 1) -> float:
    """The probability below the upper end of a two-sided interval, where so many intervals are to hold together with 95
    % (Bonferroni): 1 - 0.05 / (2 comparisons)."""
    return 1 - (1 - LEVEL) / (2 * comparisons)


def normal_point(comparisons: int = 1) -> float:
    """The point of the normal distribution at that probability: 1.96 for one comparison."""
    return NormalDist().inv_cdf(upper_end(comparisons))
