"""Dropout masks that are drawn again from their seed in the backward pass instead of being kept."""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNED_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEPS = 2**15  # resolution of the dropout probability: the odd 16-bit words
_LANES = 4  # 16-bit words in an int64
_ROWS_A_BLOCK = 64  # rows that share one word a column in the mask


def draw_seed() -> int:
    """A seed from torch's CPU generator, so that manual_seed and activation checkpointing govern it."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def dropout_probability(p: float) -> float:
    """The probability that is used for ``p``: the nearest multiple of 2^-15 that is neither 0 nor 1."""
    return min(max(round(p * _STEPS), 1), _STEPS - 1) / _STEPS


def keep_mask(rows: int, columns: int, p: float, seed: int, device: torch.device) -> Tensor:
    """int16 (rows, columns): 1 where an element is kept, 0 where it is dropped (probability ``p``).

    Tabulation hashing (Patrascu and Thorup 2012, doi:10.1145/2220357.2220361): every column has a random odd 16-bit
    word for each block of rows and one for each place in a block, and an element's word is their product. Odd words are
    a group under multiplication, so any three elements are independent, elements of different columns always; and a
    product costs one pass where a hash of the position costs ten.
    """
    places = min(rows, _ROWS_A_BLOCK)
    blocks = -(-rows // _ROWS_A_BLOCK)
    lanes = (blocks + places) * columns
    words = torch.empty(-(-lanes // _LANES), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    words = words.view(torch.int16)[:lanes].bitwise_or_(1).view(blocks + places, columns)
    kept = (words[:blocks, None] * words[None, blocks:]).view(-1, columns)[:rows]
    return torch.ge(kept, 2 * round(dropout_probability(p) * _STEPS) - _STEPS, out=kept)


def drop_(x: Tensor, mask: Tensor) -> None:
    """Zero x, of the mask's shape, where the mask is 0. Works on the bits, so it is exact for inf and nan too."""
    bits = _SIGNED_BITS[x.element_size()]
    x.view(bits).mul_(mask.to(bits))


def dropped_into(mask: Tensor, x: Tensor) -> Tensor:
    """A copy of x that is 0 where the mask is; takes the mask's memory where an element has its size."""
    bits = _SIGNED_BITS[x.element_size()]
    return mask.to(bits).mul_(x.view(bits)).view(x.dtype)
