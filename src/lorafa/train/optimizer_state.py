"""What optimizers keep beside the parameters after their first step, in bytes; step counters apart.

Each function takes what is trained and the pairs of factors among it, and reads what decides its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype, nn

    from lorafa.optimizers.pairs import Pair
    from lorafa.train.schema import OptimConfig

State = Callable[[Sequence["nn.Parameter"], Sequence["Pair"], "OptimConfig"], int]


def nothing(*_: object) -> int:
    return 0


def one_buffer(trained: Sequence[nn.Parameter], pairs: object, optim: OptimConfig) -> int:
    """SGD: a buffer of each parameter's own dtype where there is momentum."""
    return sum(p.numel() * p.element_size() for p in trained) if optim.momentum else 0


def two_moments(trained: Sequence[nn.Parameter], *_: object) -> int:
    """torch's AdamW: both in the parameter's own dtype."""
    return sum(2 * p.numel() * p.element_size() for p in trained)


def two_wide_moments(trained: Sequence[nn.Parameter], *_: object) -> int:
    """`lorafa.optimizers.adamw`: both in float32 also of a half-precision parameter."""
    return sum(2 * p.numel() * _wide(p.dtype) for p in trained)


def rows_and_columns(trained: Sequence[nn.Parameter], *_: object) -> int:
    """Adafactor's second moment (arXiv:1804.04235): of a matrix one number a row and one a column, in float32."""
    return sum(map(_row_and_column, trained))


def moments_of_weights(trained: Sequence[nn.Parameter], pairs: Sequence[Pair], *_: object) -> int:
    """LoRA-Pro's AdamW in full: two moments of every adapted weight, and of what else is trained."""
    total, factors = 0, set()
    for pair in pairs:
        A, B = pair.matrices_A(pair.A), pair.matrices_B(pair.B)
        total += 2 * B.shape[0] * B.shape[1] * A.shape[2] * _wide(pair.B.dtype)
        factors |= {pair.A, pair.B}
    return total + two_wide_moments([p for p in trained if p not in factors])


def _wide(dtype: dtype) -> int:
    """Bytes of a number where half precision is kept in float32."""
    from lorafa.linalg import working_dtype

    return working_dtype(dtype).itemsize


def _row_and_column(parameter: nn.Parameter) -> int:
    shape = tuple(parameter.shape)
    whole = math.prod(shape)
    return 4 * (whole if len(shape) < 2 else whole // shape[-1] + whole // shape[-2])
