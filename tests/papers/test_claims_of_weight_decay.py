"""What weight decay leaves of the update B A, for every optimizer that knows its pairs: in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.pairs import pairs_of
from toys.optimizers import adapted, update

LR, DECAY = 0.03, 0.2
PATTERNS: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 9.0}, "use_rslora": True}


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lr", [LR, 1.0, 20.0], ids=["usual", "large", "beyond 1 / decay"])
def test_decay_of_lora_pro_in_full_shrinks_the_update_as_adamw_does_a_weight(lr: float) -> None:
    """By 1 - lr decay a step, where A and B each by that would shrink it by the square; no gradient, so no step."""
    model, weights = adapted(**PATTERNS), {}
    optimizer = create_lorapro_optimizer(model, form="full", lr=lr, weight_decay=DECAY)
    for pair in pairs_of(model):
        weights[pair.path] = nn.Parameter(update(pair).detach().clone())
        for parameter in (pair.A, pair.B, weights[pair.path]):
            parameter.grad = torch.zeros_like(parameter)
    whole = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=DECAY)
    for _ in range(3):
        optimizer.step()
        whole.step()
        for pair in pairs_of(model):
            near(update(pair), weights[pair.path].detach())


Decayed = Callable[[nn.Module], torch.optim.Optimizer]
DECAYED: dict[str, tuple[Decayed, int]] = {
    "lora_pro adamw": (lambda m: create_lorapro_optimizer(m, lr=LR, weight_decay=DECAY), 2),
    "lora_plus": (lambda m: create_loraplus_optimizer(m, AdamW, lr=LR, loraplus_lr_ratio=1, weight_decay=DECAY), 2),
    "riemannian": (lambda m: create_riemannian_optimizer(m, AdamW, lr=LR, weight_decay=DECAY), 2),
    "preconditioned": (lambda m: create_preconditioned_adamw(m, lr=LR, weight_decay=DECAY), 2),
    "lora_fa exact": (lambda m: create_lorafa_optimizer(m, lr=LR, weight_decay=DECAY), 1),
    "lora_fa fold": (lambda m: create_lorafa_optimizer(m, lr=LR, weight_decay=DECAY, algorithm="fold"), 1),
    "lora_pro full": (lambda m: create_lorapro_optimizer(m, lr=LR, weight_decay=DECAY, form="full"), 1),
}
"""How an optimizer is made, and the power of 1 - lr decay by which it shrinks B A: that of each factor it decays."""


@pytest.mark.parametrize("name", DECAYED)
def test_decay_shrinks_the_update_by_the_power_the_documents_give(name: str) -> None:
    model = adapted()
    make, power = DECAYED[name]
    optimizer = make(model)
    before = {pair.path: update(pair) for pair in pairs_of(model)}
    for pair in pairs_of(model):
        for factor in (pair.A, pair.B):
            factor.grad = torch.zeros_like(factor) if factor.requires_grad else None
    optimizer.step()
    for pair in pairs_of(model):
        near(update(pair), (1 - LR * DECAY) ** power * before[pair.path])
