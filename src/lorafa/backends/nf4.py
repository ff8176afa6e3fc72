"""A linear layer in 4 bits: blocks of 64 weights share a scale, codes index 16 levels (QLoRA, arXiv:2305.14314).

Plain PyTorch, so it runs on every device. Half a byte a weight plus 4 bytes a block.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafa.backends.quantized import QuantizedBackend, QuantizedLinear

BLOCK = 64


def normal_float_levels() -> Tensor:
    """The 16 levels in [-1, 1], (16,): quantiles of a normal variable, 8 above zero, 7 below, and zero (appendix E)."""
    edge = 0.9677083
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()


class NF4Linear(QuantizedLinear):
    """Holds W (out, in) as NF4 codes; computes x W^T + b in the dtype of x."""

    exact: ClassVar[tuple[str, ...]] = ("levels", "scale")
    levels: Tensor
    scale: Tensor
    codes: Tensor

    def quantize(self, weight: Tensor) -> None:
        levels = normal_float_levels().to(weight.device)
        blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
        codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("scale", scale)
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = torch.stack([self.codes >> 4, self.codes & 15], dim=1).view(-1, BLOCK).int()
        flat = (self.levels[codes] * self.scale).flatten()[: self.out_features * self.in_features]
        return flat.view(self.out_features, self.in_features).to(dtype)


class NF4Backend(QuantizedBackend):
    layer_type = NF4Linear
