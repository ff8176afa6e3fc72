"""How many of all are right: the share, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorafa.evals.intervals import normal_point


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The bounds of the 95 % interval of a proportion (Wilson 1927, JASA 22:209)."""
    share, z = correct / total, normal_point()
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if correct == 0 else (middle - half) / scale  # exactly: rounding would leave 3e-18
    return low, 1.0 if correct == total else (middle + half) / scale


def share(right: Sequence[bool]) -> dict[str, Any]:
    """``accuracy`` of answers that are right or wrong, ``correct`` of ``total``, and its 95 % ``interval`` (Wilson)."""
    correct, total = sum(right), len(right)
    return {
        "accuracy": correct / total, "correct": correct, "total": total, "interval": wilson_interval(correct, total),
    }  # fmt: skip


def in_words(right: Sequence[bool], what: str = "right") -> str:
    """ "3 of 8 right (37.5%)"."""
    return f"{sum(right)} of {len(right)} {what} ({sum(right) / len(right):.1%})"
