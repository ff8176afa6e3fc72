"""LoRA-GA with the clip of its authors' scripts, ``init.norm_clip``: a start no larger than the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lorafa.initializers.base import InitResult, initializer
from lorafa.initializers.lora_ga import STAGES, lora_ga
from lorafa.initializers.stages import clipped
from lorafa.settings.methods import LoraGAConfig
from lorafa.spec import LayerSpec


@initializer(
    needs=("gradient",),
    reads_weight=True,
    settings=LoraGAConfig,
    moves_base=True,
    per_rank=2,
    stages=replace(STAGES, scale="as lora_ga, no entry larger than those of W"),
)
def lora_ga_clipped(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """:func:`lora_ga`, shrunk by :func:`~lorafa.initializers.stages.clipped`; raises as it does.

    Settings: :class:`~lorafa.LoraGAConfig`, given as ``init_config``.
    """
    return clipped(lora_ga(weight, stats, spec), weight, spec)
