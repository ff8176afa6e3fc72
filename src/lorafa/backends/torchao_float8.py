"""torchao's Float8Tensor: floating-point numbers of 8 bits with a scale a row, or one for the whole matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorafa.backends.torchao import TorchaoBackend


class TorchaoFloat8Backend(TorchaoBackend):
    def quantize(self, weight: Tensor, like: Any) -> Any:
        from torchao.quantization import Float8Tensor, PerRow, PerTensor

        whole = tuple(like.block_size) == tuple(weight.shape)
        return Float8Tensor.from_hp(
            weight,
            like.qdata.dtype,
            PerTensor() if whole else PerRow(),
            mm_config=like.mm_config,
            kernel_preference=like.kernel_preference,
        )

    def config(self) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig

        return Float8WeightOnlyConfig()
