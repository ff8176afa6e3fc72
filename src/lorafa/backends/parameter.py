"""A bare parameter of a module: a matrix (out, in), or a stack of E experts (E, out, in) or (E, in, out)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafa.backends.base import Backend, replaced
from lorafa.backends.oddities import fixed, odd_storage


class ParameterBackend(Backend):
    """Made for one parameter name, so it is not in the table of layer types."""

    host = "experts"

    def __init__(self, parameter_name: str) -> None:
        self.parameter_name = parameter_name

    def serves(self, layer: nn.Module) -> str | None:
        return odd_storage(layer, self.parameter_name)

    def reads(self, layer: nn.Module) -> str | None:
        """The updated parameter stands in for the module's own in each call, whatever the module does with it."""
        return None

    def merges(self, layer: nn.Module) -> str | None:
        return fixed(layer, self.parameter_name)

    def is_transposed(self, layer: nn.Module) -> bool:
        """Whether the layer stores (E, in, out); transformers marks such expert modules ``is_transposed``."""
        return bool(getattr(layer, "is_transposed", False)) and self.parameter(layer).dim() == 3

    def parameter(self, layer: nn.Module) -> Tensor:
        parameter: Tensor = getattr(layer, self.parameter_name)
        return parameter

    def weight(self, layer: nn.Module) -> Tensor:
        return self.to_matrix(layer, self.parameter(layer))

    def to_matrix(self, layer: nn.Module, stored: Tensor) -> Tensor:
        """(out, in) or (E, out, in), as a view of the stored tensor."""
        return stored.transpose(-2, -1) if self.is_transposed(layer) else stored

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        out, in_ = self.weight(layer).shape[-2:]
        return int(out), int(in_)

    def full_shape(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(self.weight(layer).shape)

    def dtype(self, layer: nn.Module) -> torch.dtype:
        return self.parameter(layer).dtype

    def bias(self, layer: nn.Module) -> Tensor | None:
        return None

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        stored = matrix.transpose(-2, -1) if self.is_transposed(layer) else matrix
        return stored.to(self.parameter(layer).dtype)

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        return replaced(layer, **{self.parameter_name: self.to_layout(layer, weight)})

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        module = nn.Module()
        module.register_parameter(self.parameter_name, nn.Parameter(weight.clone()))
        return module
