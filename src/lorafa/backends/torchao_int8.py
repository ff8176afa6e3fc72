"""torchao's Int8Tensor: codes of 8 bits with a scale a row, a group of columns or the whole matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorafa.backends.torchao import TorchaoBackend, quantized_linear


class TorchaoInt8Backend(TorchaoBackend):
    def quantize(self, weight: Tensor, like: Any) -> Any:
        from torchao.quantization import Int8Tensor, PerGroup, PerRow, PerTensor

        rows, columns = like.block_size
        whole = {(1, weight.shape[1]): PerRow(), tuple(weight.shape): PerTensor()}
        granularity = whole.get((rows, columns), PerGroup(columns))
        return Int8Tensor.from_hp(weight, granularity, reduce_range=like.reduce_range)

    def config(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()


def linear_8bit(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear layer with the codes of a weight (out, in), a scale a row, that torchao has made.

    Raises:
        ImportError: torchao is not installed.
    """
    return quantized_linear(weight, bias, TorchaoInt8Backend().config())
