"""What an optimizer would refuse, found out before there are weights: it is made for a toy of the adapted layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorafa.adapter import Variant
from lorafa.config import LoraConfig
from lorafa.initializers.settings import START_SETTINGS
from lorafa.peft_model import get_peft_model
from lorafa.surgery.walk import lora_layers
from lorafa.train.settings.optim import OptimConfig, entry_of, pair_optimizer

_RANK = 4


def rehearse(
    layers: Sequence[tuple[str, bool, Variant]], rank: int, config: LoraConfig, optim: OptimConfig
) -> None:
    """Make the optimizer for small layers of the same names: the formula, which factors are trained, and how A starts
    decides.

    One layer of each sort does, an embedding and any other. A start from data or to a quantized base, which a toy does
    not have, is taken to begin with a full-rank A, unless its formula is its own; that one reads a random gradient.

    Args:
        layers: dotted name in the model of every adapted layer, whether it is an embedding, and its formula.
        rank: of the first of them, which the toy has where the formula is the start's own: that may not go with others.

    Raises:
        AdapterError: that of the training, with the name of the first layer in its way.
    """
    if entry_of(optim).make is None:
        return
    if config.start.initializer.variant is None:
        rank = _RANK
    size = 2 * rank
    first = {is_table: path for path, is_table, _ in reversed(layers)}
    formulas = {path: variant for path, _, variant in layers}
    toy = nn.Module()
    with torch.random.fork_rng(devices=[]):
        for path, is_table, _ in layers:
            if path in first.values():
                _add(toy, path, nn.Embedding(size, size) if is_table else nn.Linear(size, size))
        settings: dict[str, Any] = {"init_seed": 0, "freeze_A": config.freeze_A, **_start(config)}
        toy_config = LoraConfig(r=rank, target_modules=list(first.values()), **settings)
        gradient = {"gradient.S": torch.ones(size), "gradient.dense": torch.randn(size, size)}
        stats = dict.fromkeys(first.values(), gradient) if toy_config.start.initializer.needs else None
        model = get_peft_model(toy, toy_config, stats=stats)
        for path, layer in lora_layers(toy):
            for adapter in layer.adapters.values():
                adapter.variant = _without_extras(formulas[path])
        pair_optimizer(model, optim)


def _without_extras(formula: Variant) -> Variant:
    """A formula on a toy, which has A and B alone: optimizers ask what it is, and compute nothing by it."""
    stand_in = copy.copy(formula)
    stand_in.extras = {}
    return stand_in


def _start(config: LoraConfig) -> dict[str, Any]:
    start = config.start
    if start.initializer.variant is None and (start.initializer.needs or start.initializer.quantizer):
        return {}
    return {name: getattr(config, name) for name in ("init_lora_weights", *START_SETTINGS)}


def _add(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, layer)
