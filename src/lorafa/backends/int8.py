"""A linear layer in 8 bits: every output row has a scale, codes are -127 .. 127 (LLM.int8(), arXiv:2208.07339, 2.1).

A byte a weight plus 4 bytes a row; inputs stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafa.backends.quantized import QuantizedBackend, QuantizedLinear

LARGEST = 127


class Int8Linear(QuantizedLinear):
    """Holds W (out, in) as 8-bit integers; computes x W^T + b in the dtype of x."""

    scale: Tensor
    codes: Tensor

    def quantize(self, weight: Tensor) -> None:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (weight / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes * self.scale).to(dtype)


class Int8Backend(QuantizedBackend):
    layer_type = Int8Linear
