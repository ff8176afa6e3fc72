"""Rows of a batch: which of them count, and how many there had better be."""

from __future__ import annotations

from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of a position that is not trained on, as in transformers and `torch.nn.functional.cross_entropy`."""

ROW_MULTIPLE = 32
"""On a CPU, rows are filled up with zeros to a multiple of this where that changes no result. The matrix library keeps
a kernel for every number of rows it has met, and memory freed at many different sizes leaves gaps that cannot be used
again."""


def filled_up(rows: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """Rows (T, n), on a CPU followed by zeros up to a multiple."""
    more = -len(rows) % multiple if rows.device.type == "cpu" else 0
    return nn.functional.pad(rows, (0, 0, 0, more)) if more else rows
