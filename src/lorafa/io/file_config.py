"""The config that is written beside an adapter's tensors, where that is not the config it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lorafa.adapter import Variant
from lorafa.config import LoraConfig
from lorafa.initializers import known_start
from lorafa.initializers.base import Initializer
from lorafa.io.peft_format import has_start
from lorafa.layers.base import LoraLayer
from lorafa.surgery.alone import layers_alone
from lorafa.surgery.doubled import doubled
from lorafa.surgery.plain_config import NO_START, defaults_of


def file_config(model: nn.Module, name: str, config: LoraConfig) -> LoraConfig:
    """The config that goes with :func:`lorafa.io.peft_format.file_tensors`.

    Rank and alpha grow where a start was stacked onto A and B. The field that asks for how B A is formed is left out
    where the file holds the dense A and B, a start stacked onto them, or a formula over that one, which PEFT has of no
    two: what is left PEFT reads. ``init_lora_weights`` is written for PEFT, which makes
    the start before it reads the tensors:

    * PEFT can make it on these layers: it is written as it is.
    * PEFT cannot, and the start left the base alone: True, because only the tensors matter by now.
    * The start moved the base, and was stacked onto A and B: True.
    * The start moved the base under a variant such as DoRA, where it cannot be stacked: it is written as it is, and
      PEFT makes it again or refuses.
    """
    layers = [layer for _, layer in layers_alone(model, name)]
    plain = all(layer.adapters[name].variant.plain for layer in layers)
    config = _for_peft(config, [layer.adapters[name].variant for layer in layers], stacked=has_start(model, name))
    if not has_start(model, name):
        if _peft_makes(known_start(config.init_lora_weights).initializer, layers, plain=plain, bias=config.lora_bias):
            return config
        return replace(config, **NO_START)
    if not all(layer.adapters[name].variant.stacks_start for layer in layers):
        return config
    return doubled(config)


def _for_peft(config: LoraConfig, variants: Sequence[Variant], *, stacked: bool) -> LoraConfig:
    """The config without the switch of the innermost formula, where PEFT would misread the tensors by it."""
    misread = [v for v in variants if stacked or v.has_dense_files or v.inner is not None]
    off = defaults_of(variant.chain()[-1].switch for variant in misread)
    return replace(config, **off) if off else config


def _peft_makes(start: Initializer, layers: Sequence[LoraLayer], *, plain: bool, bias: bool) -> bool:
    """Whether PEFT makes the start by its name on all these layers, for their formula (plain: s B A) and bias of B."""
    on, beside = start.peft_makes_on, start.peft_makes_with
    goes = (plain or "formula" in beside) and (not bias or "lora_bias" in beside)
    return goes and (on is None or all(layer.kind in on for layer in layers))
