"""torchao's IntxUnpackedToInt8Tensor: codes of 1 to 8 bits, held in bytes, with a scale for each block of columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafa.backends.torchao import TorchaoBackend


class TorchaoIntxBackend(TorchaoBackend):
    """Requantizes with torchao's own choice of scales, in float32: a tensor does not say how those it has were chosen
    (without clipping, by HQQ, or rounded to another dtype)."""

    def quantize(self, weight: Tensor, like: Any) -> Any:
        from torchao.quantization import IntxUnpackedToInt8Tensor
        from torchao.quantization.quant_primitives import MappingType

        kind = MappingType.ASYMMETRIC if bool(like.zero_point.any()) else MappingType.SYMMETRIC
        return IntxUnpackedToInt8Tensor.from_hp(weight, like.block_size, like.target_dtype, mapping_type=kind)

    def config(self) -> Any:
        from torchao.quantization import IntxWeightOnlyConfig

        return IntxWeightOnlyConfig(weight_dtype=torch.int4)  # type: ignore[attr-defined]
