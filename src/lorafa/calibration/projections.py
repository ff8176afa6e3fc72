"""Random matrices that every process and every restart draws alike."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


class Projections:
    """Gaussian matrices by (role, shape), drawn once and shared by all layers of that width."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._drawn: dict[tuple[object, ...], Tensor] = {}

    def get(self, role: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A (rows, columns) matrix of variance 1 / rows, rounded to the dtype of ``like`` and on its device.

        Drawn on the CPU from (seed, role, shape): the same everywhere.
        """
        key = (role, rows, columns, like.dtype, like.device)
        if key not in self._drawn:
            digest = hashlib.blake2b(f"{self.seed}\0{role}\0{rows}\0{columns}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(rows)
            self._drawn[key] = drawn.to(like)
        return self._drawn[key]
