"""LoRA-SB: delta W = s B R A, of which the core R alone is trained (Ponkshe et al. 2024, arXiv:2411.19557).

For orthonormal A and B the gradient of R, s B^T G A^T, is that of the best step the span of A and B allows, whatever
the step before it was (theorem 2 of the paper).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, Extra, Tensors, full_precision
from lorafa.numerics.linalg import working_dtype
from lorafa.spec import LayerSpec, Shape
from lorafa.variants.lora import LoRA


class LoRASB(LoRA):
    """LoRA with B R in place of B; R is (r, r). Asked for by its start, ``lora_sb``."""

    name = "lora_sb"
    extras: Mapping[str, Extra] = {"core": Extra("lora_core")}
    hosts = frozenset({"linear"})
    takes_bias = False
    factors_are_stored = False
    takes_empty_ranks = False

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        return super().shapes(weight, spec) | {"core": (spec.rank, spec.rank)}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """R = 0, which changes nothing."""
        return {"core": torch.zeros(spec.rank, spec.rank)}

    def factors(self, tensors: Tensors, *, training: bool = False) -> tuple[Tensor, Tensor]:
        dtype = working_dtype(tensors.B.dtype)
        with full_precision(tensors.B):
            return tensors.A, (tensors.B.to(dtype) @ tensors.extra("core").to(dtype)).to(tensors.B.dtype)

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        return nn.functional.linear(z, adapter.extra("core").to(z.dtype))
