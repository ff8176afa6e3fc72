"""Which tokens of a batch count."""

from __future__ import annotations

import torch
from torch import Tensor


def counted(shape: torch.Size, attended: Tensor | None, labels: Tensor | None, ignored: int) -> Tensor | None:
    """Which tokens of an input (*shape, in) count: those attended to and labelled; None: all do.

    A mask or labels of another shape say nothing of these tokens: a decoder's labels of the encoder's input, or one
    label for a whole row.

    Args:
        attended: attention mask, true where a token is.
        labels: true where they are not ``ignored``.

    Returns:
        bool of that shape, or None.
    """
    counts = None
    if attended is not None and attended.shape == shape:
        counts = attended.bool()
    if labels is not None and labels.shape == shape:
        labelled = labels != ignored
        counts = labelled if counts is None else counts & labelled
    return counts
