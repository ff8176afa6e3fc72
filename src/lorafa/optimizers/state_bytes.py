"""What optimizers keep beside the parameters after their first step, in bytes; step counters apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorafa.numerics.linalg import working_dtype
from lorafa.optimizers.pairs import Pair


@dataclass(frozen=True)
class Sizes:
    """What decides how much an optimizer keeps."""

    trained: Sequence[nn.Parameter]
    """Everything that is trained."""
    pairs: Sequence[Pair] = ()
    """The pairs of factors among it."""


State = Callable[[Sizes, Any], int]
"""(sizes, the optimizer's own settings) -> bytes."""


def nothing(sizes: Sizes, settings: Any = None) -> int:
    return 0


def one_buffer(sizes: Sizes, settings: Any = None) -> int:
    """SGD with momentum: a buffer of each parameter's own dtype."""
    return sum(p.numel() * p.element_size() for p in sizes.trained)


def two_moments(sizes: Sizes, settings: Any = None) -> int:
    """torch's AdamW: both in the parameter's own dtype."""
    return sum(2 * p.numel() * p.element_size() for p in sizes.trained)


def two_wide_moments(sizes: Sizes, settings: Any = None) -> int:
    """`lorafa.optimizers.adamw`: both in float32 also of a half-precision parameter."""
    return sum(2 * p.numel() * working_dtype(p.dtype).itemsize for p in sizes.trained)


def rows_and_columns(sizes: Sizes, settings: Any = None) -> int:
    """Adafactor's second moment (arXiv:1804.04235): of a matrix one number a row and one a column, in float32."""
    return sum(map(_row_and_column, sizes.trained))


def moments_of_weights(sizes: Sizes, settings: Any = None) -> int:
    """LoRA-Pro's AdamW in full: two moments of every adapted weight, and of what else is trained."""
    total, factors = 0, set()
    for pair in sizes.pairs:
        A, B = pair.matrices_A(pair.A), pair.matrices_B(pair.B)
        total += 2 * B.shape[0] * B.shape[1] * A.shape[2] * working_dtype(pair.B.dtype).itemsize
        factors |= {pair.A, pair.B}
    return total + two_wide_moments(replace(sizes, trained=[p for p in sizes.trained if p not in factors]))


def _row_and_column(parameter: nn.Parameter) -> int:
    shape = tuple(parameter.shape)
    whole = math.prod(shape)
    return 4 * (whole if len(shape) < 2 else whole // shape[-1] + whole // shape[-2])
