"""Rows of several sources in one order, with the shares that are asked for all along it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int32]


def mixed(rows: Sequence[Numbers], weights: Sequence[float] | None, most: int | None) -> Numbers:
    """The rows of all sources, each source in its own order.

    Row j of a source with the weight w has its turn at (j + 1/2) / w, so the first rows of the order, however many,
    have the shares as nearly as whole rows can (it is Sainte-Laguë's rule for seats).

    Args:
        rows: of each source, the numbers of its rows in its order.
        weights: of each source; None: each row once, so that the weights are the numbers of rows.
        most: take so many. With weights a source that has no row left begins again with its first one. None: with
            weights up to the turn of a row that is not there, so that none is taken twice; without, all.
    """
    if len(rows) == 1 and weights is None:
        return rows[0][:most]  # without the memory of numbers for turns
    counts = [len(own) for own in rows]
    shares = [float(count) for count in counts] if weights is None else list(weights)
    taken, until = counts, math.inf
    if weights is not None and most is not None:
        taken = [math.ceil(most * share / sum(shares)) + 1 for share in shares]
    elif weights is not None:
        until = min((count + 0.5) / share for count, share in zip(counts, shares, strict=True))
    turns = [(np.arange(count) + 0.5) / max(share, 1.0e-300) for count, share in zip(taken, shares, strict=True)]
    turns = [own[own < until] for own in turns]
    numbers = [own[np.arange(len(turn)) % max(len(own), 1)] for own, turn in zip(rows, turns, strict=True)]
    order = np.argsort(np.concatenate(turns), kind="stable")[:most]
    chosen: Numbers = np.concatenate(numbers)[order]
    return chosen
