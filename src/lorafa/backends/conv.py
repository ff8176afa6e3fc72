"""torch.nn.Conv1d/2d/3d: kernels (out, in / groups, k...), flattened to (out, in * k...)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafa.backends.base import Backend, replaced
from lorafa.backends.oddities import changing_hooks, own_forward
from lorafa.errors import BackendError

_TYPES = ("Conv1d", "Conv2d", "Conv3d")


class ConvBackend(Backend):
    """With groups > 1 an update of all-to-all rank cannot be written into the kernel: what needs that raises."""

    host = "conv"
    dims: ClassVar[int] = 1
    type: ClassVar[type[nn.Module]] = nn.Conv1d
    formula: ClassVar[Mapping[str, frozenset[str]]] = {
        method: frozenset(f"torch.nn.modules.conv.{name}.{method}" for name in _TYPES)
        for method in ("forward", "_conv_forward")
    }

    def serves(self, layer: nn.Module) -> str | None:
        """Why A cannot see what the kernel sees: inputs may be padded in a forward or hook."""
        odd = own_forward(layer, self.formula) or changing_hooks(layer, outputs=False)
        return super().serves(layer) if odd is None else f"{odd}, so what its kernel sees is not known"

    def weight(self, layer: nn.Module) -> Tensor:
        self._refuse_groups(layer)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.flatten(1)

    def with_weight(self, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        kernel: Tensor = layer.weight  # type: ignore[assignment]
        return replaced(layer, weight=weight.reshape(kernel.shape), bias=bias)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        conv: Any = layer
        return conv.out_channels, conv.in_channels * prod(conv.kernel_size)

    def stored_shape(self, layer: nn.Module) -> tuple[int, ...]:
        conv: Any = layer
        return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size

    def to_layout(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        kernel: Tensor = layer.weight  # type: ignore[assignment]
        return matrix.reshape(kernel.shape).to(kernel.dtype)

    def _refuse_groups(self, layer: nn.Module) -> None:
        if layer.groups != 1:
            raise BackendError(
                f"A {type(layer).__name__} with groups={layer.groups} has no weight that could hold this update: A "
                "sees all input channels, a grouped kernel only its own. Merging, DoRA and starts from the weight need "
                "groups=1."
            )

    def example(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        kernel = (2,) + (1,) * (self.dims - 1)  # in = channels * 2
        channels = weight.shape[1] // 2
        layer = self.type(channels, weight.shape[0], kernel, bias=bias is not None)
        layer.weight = nn.Parameter(weight.reshape(weight.shape[0], channels, *kernel).clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        return layer


class Conv2dBackend(ConvBackend):
    dims = 2
    type = nn.Conv2d


class Conv3dBackend(ConvBackend):
    dims = 3
    type = nn.Conv3d
