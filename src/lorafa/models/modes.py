"""Modes of a model that hold for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def reading_last_positions(model: nn.Module) -> Iterator[None]:
    """The output head copies what it reads into one piece inside the block.

    Answers need the logits of the last position alone, (rows, 1, width) cut out of (rows, tokens, width). PyTorch
    multiplies such a slice row by row, and its bfloat16 kernel on a CPU copies the head's weight once a row for it:
    8 x 54 MiB for SmolLM2-135M. A slice in one piece, a few KiB, is a single product. A model that does not name its
    output head (``get_output_embeddings``) is left alone.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    hook = None if head is None else head.register_forward_pre_hook(_in_one_piece)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _in_one_piece(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)
