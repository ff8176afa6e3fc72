"""Batches of pairs: how they are cut is nobody's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorafa import LoraConfig, get_peft_model
from lorafa.optimizers import (
    batches,
    create_lorafa_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.pairs import pairs_of

MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "lora-fa": lambda model: create_lorafa_optimizer(model, lr=1e-2),
    "riemannian": lambda model: create_riemannian_optimizer(model, AdamW, lr=1e-2),
    "preconditioned": lambda model: create_preconditioned_adamw(model, lr=1e-2),
    "lora-pro": lambda model: create_lorapro_optimizer(model, lr=1e-2),
}


def trained(make: Callable[[nn.Module], Any]) -> list[Tensor]:
    """Parameters after three steps; four layers of two shapes, one of which gets no gradient in the second step."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6)).double()
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1", "2", "3"], init_lora_weights=False))
    optimizer, x = make(model), torch.randn(5, 6, dtype=torch.float64)
    for step in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if step == 1:
            for name, parameter in model.named_parameters():
                parameter.grad = None if ".1.lora" in name else parameter.grad
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", MAKERS)
def test_how_many_pairs_are_in_a_batch_does_not_change_the_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together = trained(MAKERS[name])
    monkeypatch.setattr(batches, "CACHED_BYTES", 1)
    for one, other in zip(trained(MAKERS[name]), together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_batch_fits_the_cache_and_none_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(i) for i in range(5)]
    model = get_peft_model(nn.Sequential(*(nn.Linear(6, 6) for _ in names)), LoraConfig(r=2, target_modules=names))
    pair_bytes = 4 * (2 * 6 + 6 * 2)
    for size, expected in ((2 * pair_bytes, [2, 2, 1]), (1, [1] * 5), (2**20, [5])):
        monkeypatch.setattr(batches, "CACHED_BYTES", size)
        assert [len(batch.pairs) for batch in batches.batches_of(pairs_of(model))] == expected
