"""KaSA: delta W = s B diag(d) A with a trained diagonal (Wang et al. 2024, arXiv:2412.06071)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafa.adapter import Adapter, Extra, Tensors, Variant
from lorafa.numerics.linalg import working_dtype
from lorafa.settings.methods import KasaConfig
from lorafa.spec import LayerSpec, Shape
from lorafa.variants.lora import LoRA

if TYPE_CHECKING:
    from typing_extensions import Self


class KaSA(LoRA):
    """LoRA with B diag(d) in place of B; d is (r,). Asked for by its start, ``kasa``."""

    name = "kasa"
    extras: Mapping[str, Extra] = {"diagonal": Extra("lora_diag")}
    hosts = frozenset({"linear"})
    takes_bias = False
    factors_are_stored = False
    takes_empty_ranks = False
    peft_stores = True

    def __init__(self, settings: KasaConfig) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        return cls(config.kasa_config or KasaConfig())

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        return super().shapes(weight, spec) | {"diagonal": (spec.rank,)}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """d = 1, which is LoRA."""
        return {"diagonal": torch.ones(spec.rank)}

    def factors(self, tensors: Tensors, *, training: bool = False) -> tuple[Tensor, Tensor]:
        return tensors.A, tensors.B * tensors.extra("diagonal").to(tensors.B.dtype)

    def between(self, adapter: Adapter, z: Tensor) -> Tensor:
        return z * adapter.extra("diagonal").to(z.dtype)

    def penalty(self, adapter: Adapter) -> Tensor:
        """beta ||d||^2 + gamma (||B^T B - I|| + ||A A^T - I||), Frobenius norms (equations 9 to 12 of the paper).

        The paper's code divides the sum over layers by the number of blocks, PEFT's does not; nor is it here.
        """
        dtype = working_dtype(adapter.A.dtype)
        A, B, d = adapter.A.to(dtype), adapter.B.to(dtype), adapter.extra("diagonal").to(dtype)
        one = torch.eye(adapter.rank, dtype=dtype, device=A.device)
        apart = torch.linalg.matrix_norm(B.mT @ B - one) + torch.linalg.matrix_norm(A @ A.mT - one)
        penalty: Tensor = self.settings.beta * d.square().sum() + self.settings.gamma * apart
        return penalty
