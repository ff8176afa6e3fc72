"""Linear layers as other libraries quantize them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def bnb(name: str, *, moved: bool = True, **settings: Any) -> nn.Module:
    """A layer of bitsandbytes, which quantizes when it is moved to a device."""
    import bitsandbytes

    layer: nn.Module = getattr(bitsandbytes.nn, name)(64, 64, **settings)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    return layer.to("cpu") if moved else layer


def packed_bnb() -> nn.Module:
    """As bitsandbytes leaves a layer after its first call in eval mode, on some CPUs."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer: Any = bnb("Linear4bit", compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    made: nn.Module = layer
    return made


def fp8() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer: nn.Module = FP8Linear(8, 24, block_size=(8, 8), has_bias=True)
    for tensor in layer.parameters():  # they come uninitialised
        tensor.data.fill_(1)
    return layer


def bitnet() -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    layer: nn.Module = AutoBitLinear(8, 24)
    return layer


def torchao(config: str, **settings: Any) -> nn.Module:
    from torchao import quantization

    layer = nn.Linear(64, 64)
    quantization.quantize_(layer, getattr(quantization, config)(**settings))
    return layer
