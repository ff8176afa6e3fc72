"""How many of all are right: the share, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Bounds of a proportion (Wilson 1927, JASA 22:209); ``z`` is the normal quantile, by default of 95 %."""
    share = correct / total
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
