"""The processes of torch.distributed's default group: what collecting statistics asks of them."""

from __future__ import annotations

import torch
from torch import Tensor


def distributed() -> bool:
    """Whether there are several that work together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process() -> int:
    """The number of this one, from 0."""
    return torch.distributed.get_rank() if distributed() else 0


def summed(number: float) -> float:
    """The sum over all processes."""
    if not distributed():
        return number
    return float(gathered(torch.tensor(number, dtype=torch.float64)).sum())


def gathered(tensor: Tensor) -> Tensor:
    """Of all processes, (processes, ...) on the CPU, from tensors of the same shape and dtype there."""
    own = tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor
    everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, own)
    return torch.stack(everyone).cpu()
