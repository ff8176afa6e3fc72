"""Every setting of every optimizer reaches it: another value of it leads a training elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.optimizers import OPTIMIZERS
from lorafa.settings.typed import build
from lorafa.train.fit import training_arguments
from lorafa.train.settings.optim import OptimConfig, pair_optimizer
from lorafa.train.settings.run import RunConfig, TrainConfig
from lorafa.train.trainer import LoraTrainer
from toys.compare import trained_values
from toys.data import collate, samples
from toys.training import adapted_model

Setting = tuple[str, Any]
COMMON: tuple[Setting, ...] = (("lr", 0.02), ("weight_decay", 0.3))
ADAM: tuple[Setting, ...] = (*COMMON, ("betas", (0.5, 0.999)), ("betas", (0.9, 0.9)), ("eps", 0.01))
PRO: tuple[Setting, ...] = (("X", "zero"), ("gram_damping", 0.5))
SETTINGS: dict[tuple[Setting, ...], tuple[Setting, ...]] = {
    (("name", "adamw"),): (*ADAM, ("warmup", 2.0), ("schedule", "constant"), ("max_grad_norm", 0.001)),
    (("name", "adafactor"),): COMMON,
    (("name", "sgd"),): COMMON,
    (("name", "lora_fa"),): (*ADAM, ("algorithm", "fold")),
    (("name", "lora_fa"), ("algorithm", "fold")): ADAM,
    (("name", "lora_plus"),): (*ADAM, ("lr_ratio", 3.0)),
    (("name", "riemannian"),): (*ADAM, ("reg", 0.5), ("damping", "absolute")),
    (("name", "preconditioned"),): (*ADAM, ("prec_reg", 0.5)),
    (("name", "lora_pro"),): (*ADAM, *PRO, ("form", "sgd"), ("form", "full")),
    (("name", "lora_pro"), ("form", "sgd")): (*COMMON, *PRO, ("momentum", 0.9)),
    (("name", "lora_pro"), ("form", "full")): (*ADAM, *PRO),
}
"""An optimizer, or one form of it -> the settings it reads, each with a value that is not its default."""


@cache
def trained(*settings: Setting) -> Mapping[str, Tensor]:
    """The adapter after three steps with these settings; what transformers makes, it makes as in a run."""
    optim = build(OptimConfig, dict(settings), "optim")
    model = adapted_model()
    optimizer = pair_optimizer(model, optim)
    if optimizer is None:
        with TemporaryDirectory() as folder:
            config = RunConfig(optim=optim, train=TrainConfig(steps=3, batch_size=2))
            arguments = training_arguments(config, Path(folder))
            LoraTrainer(model, arguments, train_dataset=samples(), data_collator=collate).train()
        return trained_values(model)
    for step in range(3):
        model(**collate(samples(2, seed=step))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained_values(model)


@pytest.mark.parametrize(
    ("optimizer", "setting"), [(chosen, one) for chosen, settings in SETTINGS.items() for one in settings], ids=str
)
def test_another_value_of_a_setting_leads_elsewhere(optimizer: tuple[Setting, ...], setting: Setting) -> None:
    usual, other = trained(*optimizer), trained(*optimizer, setting)
    assert usual.keys() == other.keys()
    assert all(bool(value.isfinite().all()) for value in other.values())
    assert not all(torch.allclose(usual[name], other[name], rtol=1e-4, atol=0) for name in usual)


def test_every_setting_is_tried() -> None:
    tried = {name for settings in SETTINGS.values() for name, _ in settings}
    own = [OPTIMIZERS.get(name).settings for name in OPTIMIZERS.names()]
    known = {field.name for settings in (OptimConfig, *filter(None, own)) for field in fields(settings)}
    elsewhere = {"shorten_warmup"}  # tests/unit/train/test_lengths.py: it acts where a warm-up would be refused
    assert {"name", "own", "own_of_schedule", *elsewhere, *tried} == known


@pytest.mark.parametrize("name", ["adamw", "lora_pro"])
def test_the_same_settings_lead_to_the_same_place(name: str) -> None:
    """So that a difference above is the setting's."""
    again = trained.__wrapped__(("name", name))
    assert all(torch.equal(value, again[key]) for key, value in trained(("name", name)).items())
