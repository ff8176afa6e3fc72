"""The second moment of the gradients that arrive at a layer's output, entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafa.calibration.base import Measured, Statistic
from lorafa.numerics.linalg import float_matrix


class OutputMoment(Statistic):
    """Result: ``Y`` (out,), the mean over tokens of g^2, entry by entry, with g one token's gradient of the output.

    g is in the units in which the gradient G of the weight is the mean over tokens of g x^T: the gradient d that
    arrives, times the number of tokens, over the sum of the batches' weights. A token counts where d is not zero: not
    padding, nor what no label depends on. ``tokens`` is their number, ``rows`` that of the rows of all batches. Where
    no gradient arrives all of it is zero.
    """

    reads_gradient = True
    depends_on_rank = False

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.sum: Tensor | None = None
        self.counts = torch.zeros(2, dtype=torch.int64)
        """Tokens and rows; rows of the running batch are not in it yet."""
        self.rows = 0
        self.weight = 0.0

    def start_batch(self, half: int) -> None:
        self.counts[1] += self.rows
        self.rows = 0

    def start_call(self, rows: int) -> None:
        self.rows = max(self.rows, rows)  # a layer that is called again has the same rows

    def update(self, x: Tensor, d: Tensor | None) -> None:
        assert d is not None  # reads_gradient
        d = float_matrix(d)
        if self.sum is None:
            self.sum, self.counts = d.new_zeros(self.layer.out), self.counts.to(d.device)
        self.sum += d.square().sum(0)
        self.counts[0] += d.ne(0).any(-1).sum()

    def sums(self) -> list[Tensor]:
        self.start_batch(0)
        if self.sum is None:
            self.sum = torch.zeros(self.layer.out)
        return [self.sum, self.counts]

    def end_pass(self, number: int, weights: tuple[float, float]) -> None:
        self.start_batch(0)
        self.weight = sum(weights)

    def result(self) -> dict[str, Tensor]:
        tokens, rows = self.counts
        total = torch.zeros(self.layer.out) if self.sum is None else self.sum
        return {"Y": total * (tokens.to(total) / self.weight**2), "tokens": tokens, "rows": rows}
