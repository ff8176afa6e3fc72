"""A weight plus low-rank updates, block by block: no float32 matrix of the weight's size is ever made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorafa.adapter import Adapter, full_precision
from lorafa.backends.base import is_plain
from lorafa.numerics.linalg import working_dtype

NUMBERS = 2**18
"""In a block: 1 MiB of float32, which stays in a processor's cache."""


def sum_in_blocks(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor | None:
    """``weight`` (out, in) plus s (B A - B0 A0) of each adapter: summed in float32, rounded to its dtype once.

    None where that is no matter of blocks: the weight is in float32, where nothing is to be saved, or is a stack, or on
    an accelerator, or some formula is not s B A.
    """
    dtype = working_dtype(weight.dtype)
    blocks = weight.dim() == 2 and weight.is_floating_point() and weight.dtype.itemsize == 2 and is_plain(weight)
    if not blocks or weight.device.type != "cpu" or not all(adapter.variant.plain for adapter in adapters):
        return None
    factors = [adapter.checked_factors() for adapter in adapters]
    if any(working_dtype(A.dtype) is not dtype or A.device != weight.device for A, _ in factors):
        return None
    rows_first = weight.stride(0) >= weight.stride(1)
    source = weight if rows_first else weight.T
    ends = [(B.to(dtype), A.to(dtype)) if rows_first else (A.T.to(dtype), B.T.to(dtype)) for A, B in factors]
    made = torch.empty_like(source)
    step = max(1, NUMBERS // max(1, source.shape[1]))
    with full_precision(weight), _one_thread():
        for begin in range(0, source.shape[0], step):
            block = source[begin : begin + step].to(dtype)
            for adapter, (left, right) in zip(adapters, ends, strict=True):
                block += (left[begin : begin + step] @ right).mul_(adapter.scaling)
            made[begin : begin + step] = block
    return made if rows_first else made.T


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block is too little work to share out: on two threads of a busy machine it took 50 times as long as on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
