"""What is looked at in a model that was just loaded, whatever its kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafa.errors import SourceError


def check_finite(where: str, model: Any, output: Tensor) -> None:
    """Raises SourceError for an output that is not finite."""
    if torch.isfinite(output).all():
        return
    dtype = str(model.dtype).removeprefix("torch.")
    or_large = "" if model.dtype == torch.float32 else ", or too large for that format: try model.dtype=float32"
    raise SourceError(f"The output of the {where} is not finite in {dtype}. Its weights are damaged{or_large}.")
