"""What collecting statistics asks of the processes of a group, beside `lorafa.processes`.

Each of these is to be called by all of them, in the same order. Where there is one process, it has all the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lorafa.errors import CalibrationError, LoraError, first_line
from lorafa.processes import distributed, gathered, rank


@contextmanager
def together() -> Iterator[None]:
    """A block that fails in all processes if it fails in one: otherwise the others would wait for that one forever.

    The process that failed raises its own error, the others the first process's that has one.
    """
    if not distributed():
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told: LoraError | None = own if isinstance(own, LoraError) else None
    if own is not None and told is None:
        told = CalibrationError(f"Process {rank()} raised {type(own).__name__}: {first_line(own)}.")
    errors = [error for error in gathered(told) if error is not None]
    if own is not None:
        raise own
    if errors:
        raise errors[0]


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all, which have it in one shape and dtype."""
    if distributed():
        own = _where_it_can_travel(tensor)
        torch.distributed.all_reduce(own)
        tensor.copy_(own)


def of_first(tensor: Tensor) -> Tensor:
    """The first one's tensor, where all have one of this shape and dtype: their roundings may differ."""
    if not distributed():
        return tensor
    own = _where_it_can_travel(tensor).clone(memory_format=torch.contiguous_format)
    torch.distributed.broadcast(own, src=0)
    return own.to(tensor.device)


def _where_it_can_travel(tensor: Tensor) -> Tensor:
    """NCCL moves nothing that is on the CPU."""
    return tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor
