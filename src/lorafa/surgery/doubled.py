"""An adapter with a frozen start as the plain LoRA it is: s (B A - B0 A0) is s [B, -B0] [A; A0], of rank 2 r."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.layers.base import LoraLayer
from lorafa.surgery.plain import stacked
from lorafa.surgery.plain_config import NO_START


def doubled(config: LoraConfig) -> LoraConfig:
    """The config with twice the ranks, the same scalings, and no start to be made."""
    factor = alpha_factor(config.use_rslora)
    return replace(
        config,
        r=config.r * 2,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={key: value * 2 for key, value in config.rank_pattern.items()},
        alpha_pattern={key: value * factor for key, value in config.alpha_pattern.items()},
        **NO_START,
    )


def alpha_factor(use_rslora: bool) -> float:
    """What alpha is multiplied by for twice the rank to have the same alpha / r, or alpha / sqrt(r)."""
    return 2**0.5 if use_rslora else 2


def stacked_start(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """A over A0 and B beside -B0, as (2 r, in) and (out, 2 r); the adapter has a start."""
    adapter = layer.adapters[name]
    return stacked((adapter.A.detach(), adapter.B.detach()), adapter.start)
