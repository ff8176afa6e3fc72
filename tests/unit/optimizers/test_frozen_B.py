"""Optimizers and an adapter whose B is frozen: what moves B refuses it, and nothing is frozen half."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD, Optimizer

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError, ConfigError
from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.pairs import pairs_of
from toys.models import Mlp
from toys.optimizers import adapted

MOVING_TOGETHER: dict[str, Callable[[PeftModel], Optimizer]] = {
    "Riemannian preconditioning": lambda model: create_riemannian_optimizer(model, SGD, lr=1e-2),
    "LoRA-One's preconditioned AdamW": lambda model: create_preconditioned_adamw(model, lr=1e-2),
    "LoRA-Pro": lambda model: create_lorapro_optimizer(model, lr=1e-2),
}


def refuse(model: PeftModel, algorithm: str, kind: type[Exception], match: str) -> None:
    def state() -> list[object]:
        layers = [
            {name: adapter.trains for name, adapter in layer.adapters.items()}
            for _, layer in model.base_model.lora_layers()
        ]
        values = [(p.requires_grad, p.tolist()) for p in model.parameters()]
        return [layers, values, copy.deepcopy(model.peft_config)]

    before = state()
    with pytest.raises(kind, match=match):
        create_lorafa_optimizer(model, lr=1e-3, algorithm=algorithm)
    assert state() == before


@pytest.mark.parametrize("algorithm", ["exact", "fold"])
@pytest.mark.parametrize("at_start", [True, False])
def test_lora_fa_refuses_an_adapter_that_trains_A_alone(at_start: bool, algorithm: str) -> None:
    """At its start A is zero; later it could be decomposed."""
    model = get_peft_model(Mlp().double(), LoraConfig(r=3, target_modules=["first"], init_lora_weights="mica"))
    if not at_start:
        with torch.no_grad():
            pairs_of(model)[0].A.normal_()
    expected = r"first, adapter 'default': B is frozen and A is trained.*LoRA-FA trains B alone.*Nothing was changed"
    refuse(model, algorithm, AdapterError, expected)


@pytest.mark.parametrize("algorithm", ["exact", "fold"])
def test_nothing_is_frozen_where_a_config_does_not_allow_a_frozen_A(algorithm: str) -> None:
    model = adapted()
    model.peft_config["default"].lora_alpha = -1
    refuse(model, algorithm, ConfigError, r"lora_alpha must be a number > 0")


@pytest.mark.parametrize("method", MOVING_TOGETHER)
def test_what_moves_both_factors_refuses_a_frozen_B(method: str) -> None:
    model = adapted(init_lora_weights="mica")
    with pytest.raises(AdapterError, match=f"B is frozen, but {method} moves A and B together. Use a stock optimizer"):
        MOVING_TOGETHER[method](model)
