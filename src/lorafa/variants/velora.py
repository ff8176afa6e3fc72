"""VeLoRA: the gradient of A is taken from compressed inputs (Miles et al. 2024, arXiv:2405.17991).

The inputs of a token are cut into groups, and of each group its product with one vector v of length 1 is kept. Backward
puts that number times v in place of the group (section 3 of the paper). Outputs, and all other gradients, are those of
LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, Extra, Variant
from lorafa.errors import ConfigError
from lorafa.numerics.fused import Keep
from lorafa.numerics.linalg import working_dtype
from lorafa.settings.methods import VeloraConfig
from lorafa.spec import LayerSpec, Shape
from lorafa.variants.lora import LoRA

if TYPE_CHECKING:
    from typing_extensions import Self


def _groups(x: Tensor, size: int) -> Tensor:
    """(..., in) -> (..., groups, size), with zeros after the last input."""
    missing = -x.shape[-1] % size
    padded = nn.functional.pad(x, (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // size, size)


def _unit(vector: Tensor) -> Tensor:
    """The vector at length 1; that of equal numbers where it is zero."""
    length = torch.linalg.vector_norm(vector)
    return torch.where(length > 0, vector / length, len(vector) ** -0.5)


@dataclass(frozen=True)
class _Projected:
    """Keeps the product of each group of inputs with a vector."""

    vector: Tensor
    scale: float
    inputs: int

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        return _groups(x, len(self.vector)) @ self.vector.to(x.dtype), self.vector

    def load(self, saved: tuple[Tensor, ...]) -> Tensor:
        products, vector = saved
        return (products.unsqueeze(-1) * (vector * self.scale).to(products.dtype)).flatten(-2)[..., : self.inputs]


class VeLoRA(LoRA):
    """LoRA that keeps ``num_groups`` numbers of an input for the gradient of A, in training mode.

    v is the mean of all groups of a batch, at length 1: of each batch, or of the first one; or a random vector. With
    dropout the elements of the input that was put together again are dropped. Where a module multiplies with its weight
    itself the layer keeps no input at all, and the gradient is exact.
    """

    name = "velora"
    switch = "velora_config"
    extras: Mapping[str, Extra] = {"vector": Extra("lora_velora_embed", trained=False)}
    hosts = frozenset({"linear"})
    learns_from_A = True

    def __init__(self, settings: VeloraConfig) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        return cls(config.velora_config)

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, Shape]:
        """v is (ceil(in / num_groups),).

        Raises:
            ConfigError: there are as many groups as inputs, so that nothing would be compressed.
        """
        inputs, count = weight.shape[-1], self.settings.num_groups
        if count >= inputs:
            raise ConfigError(
                f"{spec.name}: velora_config.num_groups={count} cuts its {inputs} inputs into groups of one, and "
                "nothing would be compressed. Set fewer groups, or leave the layer out with exclude_modules."
            )
        return super().shapes(weight, spec) | {"vector": (-(-inputs // count),)}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """A random v, or zeros, which stand for none."""
        (size,) = self.shapes(weight, spec)["vector"]
        if self.settings.goes_by_batches:
            return {"vector": torch.zeros(size)}
        return {"vector": _unit(torch.randn(size, generator=spec.generator("velora")))}

    def is_called(self, adapter: Adapter) -> bool:
        return not (adapter.layer.training and torch.is_grad_enabled())

    def kept(self, adapter: Adapter, x: Tensor, dropout: float) -> Keep | None:
        """The compressed input, in training mode; v is taken from it first where it is the batch's."""
        if not adapter.layer.training:
            return None
        vector = adapter.extra("vector")
        if self.settings.goes_by_batches and x.numel():
            with torch.no_grad():
                own = self._of_batch(x, vector)
                vector.copy_(own)
            vector = own  # what is stored changes with the next batch, maybe before this one's backward
        return _Projected(vector, self.settings.scale, x.shape[-1])

    def _of_batch(self, x: Tensor, vector: Tensor) -> Tensor:
        """v for the input x, given the one there is."""
        found = _groups(x, len(vector)).flatten(0, -2).mean(0, dtype=working_dtype(x.dtype))
        own = _unit(found).to(vector.dtype)
        return torch.where(vector.any(), vector, own) if self.settings.init_type == "batch_average_once" else own
