"""Every weight of the model is trained: what adapters are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorafa.errors import ConfigError, shorten
from lorafa.models.head_loss import AUTOCAST


def train_all(model: Any) -> None:
    """Make every weight of a model trainable.

    Raises:
        ConfigError: some of them are not floating-point numbers, as in a quantized model.
    """
    if codes := [name for name, weight in model.named_parameters() if not weight.is_floating_point()]:
        raise ConfigError(
            f"peft.full=true trains every weight, and {len(codes)} are no floating-point numbers: {shorten(codes)}. "
            "Give the model it was quantized from, or train an adapter."
        )
    model.requires_grad_(True)


@contextmanager
def in_float32(model: Any) -> Iterator[torch.dtype]:
    """The weights in float32 inside the block, where small steps add up, and rounded to what they were behind it.

    Yields:
        The dtype they had: the layers run in it (autocast), as they do below an adapter.
    """
    stored = model.dtype
    model.float()
    try:
        yield stored
    finally:
        if vars(model).pop(AUTOCAST, None) is not None:
            del model.forward
        model.to(stored)


def precision(stored: torch.dtype) -> dict[str, bool]:
    """What `transformers.TrainingArguments` is told, so that layers run in the dtype the weights were stored in.

    Raises:
        ConfigError: float16 on a CPU, whose gradients are not scaled there.
    """
    if stored == torch.float16 and not torch.cuda.is_available():
        raise ConfigError(
            "peft.full=true with weights in float16 needs a GPU, where gradients are scaled. Set model.dtype=bfloat16 "
            "or float32."
        )
    without = not torch.accelerator.is_available()
    return {"bf16": stored == torch.bfloat16, "fp16": stored == torch.float16, "use_cpu": without}


def load_weights(model: Any, folder: Path) -> None:
    """The weights of a folder, such as a checkpoint, into a model of the same class."""
    read = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(read.state_dict())
