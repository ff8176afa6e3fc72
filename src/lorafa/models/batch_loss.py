"""The loss of a batch by the loss of its rows, for models whose labels stand at their own positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lorafa.models.kinds.entry import RowLosses

SummedLoss = Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, int]]
"""(model, batch with labels) -> the summed loss of its terms, in nats, and their number."""


class BatchLoss(nn.Module):
    """The loss of one model as a module, for what wraps modules: DistributedDataParallel, `torch.compile`.

    Args:
        model: of the kind whose loss it is, plain or with adapters.
        row_losses: see :data:`lorafa.models.kinds.entry.RowLosses`.
    """

    def __init__(self, model: nn.Module, row_losses: RowLosses) -> None:
        super().__init__()
        self.model = model
        self.row_losses = row_losses

    def forward(self, batch: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        """The sum over the batch's terms divided by ``num_items``, by default their number."""
        total, count = self.summed(batch)
        return total / (count if num_items is None else num_items)

    def summed(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of a batch summed over its terms, and their number, both scalars."""
        losses, terms = self.row_losses(self.model, batch)
        return losses.sum(), terms.sum()


def summed_by_rows(row_losses: RowLosses) -> SummedLoss:
    """The loss of a batch summed over its terms, in nats, with their number."""

    def summed(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        losses, terms = row_losses(model, batch)
        return losses.sum(), int(terms.sum())

    return summed
