"""What variants, starts and surgery say to each other about one layer: its numbers, and the shapes of its factors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


def factor_shapes(weight: Tensor, rank: int) -> tuple[Shape, Shape]:
    """Shapes of a dense A and B for a weight (out, in) or (E, out, in): (r, in) and (out, r), E of each for a stack."""
    *experts, out, in_ = weight.shape
    return (*experts, rank, in_), (*experts, out, rank)


@dataclass(frozen=True)
class LayerSpec:
    """The layer being adapted."""

    name: str
    """Dotted path in the model."""
    kind: str
    """linear, embedding, conv, attention or experts."""
    rank: int
    scaling: float
    seed: int
    key: str = ""
    """Tells apart what would otherwise start alike: the adapter's name."""
    is_table: bool = False
    """Whether it looks up rows: a row of A is met only when its token is."""
    groups: int = 1
    """The groups of a convolution. With more than one, B has the columns of its own group: (out, rank / groups)."""
    settings: Any = None
    """The start's nested config (EvaConfig ...), or its part of ``init_config``; None for a start without settings."""
    freeze_A: bool = False
    """Whether only B will be trained, so that A must not start at zero."""
    number: int | None = None
    """The number in the start's name, 4 for "pissa_niter_4"."""
    repeats: bool = False
    """Whether a start made before, by PEFT, is to be found again: for a file that holds A and B but not what was taken
    from the base they were trained on."""
    shapes: tuple[Shape, Shape] | None = None
    """Shapes of A and B as the variant stores them; None: those of :func:`factor_shapes`."""

    def generator(self, part: str = "") -> torch.Generator:
        """A random source that depends on (seed, key, path) alone, not on order, device or the other layers.

        Args:
            part: what is drawn, where it is not to repeat the numbers of A.
        """
        words = [str(self.seed), self.key, self.name, *([part] if part else [])]
        digest = hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def stored_shapes(self, weight: Tensor) -> tuple[Shape, Shape]:
        """Shapes of A and B as a start has to make them for a weight (out, in) or (E, out, in)."""
        return factor_shapes(weight, self.rank) if self.shapes is None else self.shapes
