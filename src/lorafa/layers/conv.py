"""LoraConv: adapters on 1-, 2- and 3-D convolutions. A is a convolution to r channels, B a 1 x 1 one from them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafa.errors import ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.numerics.fused import Keep

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class LoraConv(LoraLayer):
    """The kernel is flattened to (out, in * k...); A's channels see all inputs, B is grouped as the base is."""

    kind = "conv"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features = cast(Conv, base_layer).in_channels  # as PEFT counts them: without the taps

    @property
    def peft_name(self) -> str:
        return f"lora.{type(self.get_base_layer()).__name__}"

    @classmethod
    def check(cls, name: str, base: nn.Module, rank: int, *, bias: bool, dropout: float) -> None:
        if rank % cls.rank_groups(base):
            raise ConfigError(
                f"{name}: rank {rank} is not divisible by the convolution's groups={cls.rank_groups(base)}. "
                "Choose another rank (rank_pattern), or exclude the layer."
            )
        super().check(name, base, rank, bias=bias, dropout=dropout)

    @classmethod
    def rank_groups(cls, base: nn.Module) -> int:
        return cast(Conv, base).groups

    def _dims(self) -> int:
        """1, 2 or 3, without a look at the weight: one that is computed may change when it is read."""
        return len(cast(Conv, self.get_base_layer()).kernel_size)

    def hold_factors(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        base = cast(Conv, self.get_base_layer())
        ones = (1,) * (A.dim() - 2)
        self.lora_A[name] = _holder(
            base, A, None, base.kernel_size, base.stride, base.padding, base.dilation, 1, base.padding_mode
        )
        self.lora_B[name] = _holder(base, B, bias, ones, ones, 0, ones, base.groups, "zeros")

    def stored_A(self, matrix: Tensor) -> Tensor:
        base = cast(Conv, self.get_base_layer())
        return matrix.reshape(matrix.shape[0], base.in_channels, *base.kernel_size)

    def stored_B(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(*matrix.shape, *(1,) * self._dims())

    def matrix_A(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def matrix_B(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def store_extra(self, value: Tensor) -> Tensor:
        return value.reshape(1, -1, *(1,) * self._dims())

    def per_output(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * self._dims())

    def fits(self, A: nn.Module, B: nn.Module) -> bool:
        base, dims = cast(Conv, self.get_base_layer()), cast(Conv, A).weight.dim() - 2
        ones = (1,) * dims
        return _settings(A) == (base.stride, base.padding, base.dilation, 1, base.padding_mode) and _settings(B) == (
            ones, (0,) * dims, ones, base.groups, "zeros"
        )  # fmt: skip

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float = 0.0, keep: Keep | None = None
    ) -> Tensor:
        base = cast(Any, self.get_base_layer())
        x = nn.functional.dropout(x, dropout) if dropout else x
        dims = self._dims()
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
        kernel = self.stored_A(A).to(x.dtype)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        z = convolve(x, kernel, None, base.stride, padding, base.dilation)
        return convolve(z, self.stored_B(B).to(x.dtype), groups=base.groups) * scaling


def _settings(module: nn.Module) -> tuple[Any, ...]:
    conv = cast(Conv, module)
    return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def _holder(base: Conv, weight: Tensor, bias: Tensor | None, kernel: Any, stride: Any, padding: Any, dilation: Any,
            groups: int, padding_mode: Any) -> nn.Module:  # fmt: skip
    kind = next(cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(base, cls))
    in_channels = weight.shape[1] * groups
    holder = kind(in_channels, weight.shape[0], kernel, stride=stride, padding=padding, dilation=dilation,
                  groups=groups, bias=False, padding_mode=padding_mode, device="meta")  # fmt: skip
    holder.weight = nn.Parameter(weight.contiguous(memory_format=torch.contiguous_format))
    if bias is not None:
        holder.bias = nn.Parameter(bias)
    return holder
