"""What stands on a stock optimizer: any class of them, its state, and what a copy would lose."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lorafa.errors import AdapterError
from lorafa.optimizers import create_loraplus_optimizer, create_lorapro_optimizer, create_riemannian_optimizer
from toys.optimizers import adapted, batch, loss

Make = Callable[..., Optimizer]
MAKERS: dict[str, Make] = {
    "riemannian": lambda model: create_riemannian_optimizer(model, AdamW, lr=1e-2),
    "riemannian sgd": lambda model: create_riemannian_optimizer(model, SGD, lr=1e-2),
    "pro adamw": lambda model: create_lorapro_optimizer(model, lr=1e-2),
    "pro sgd": lambda model: create_lorapro_optimizer(model, form="sgd", lr=1e-2),
}


def run(model: nn.Module, optimizer: Optimizer, steps: int = 3, seed: int = 5) -> None:
    torch.manual_seed(seed)
    data = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()


STOCK = [
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Adadelta, torch.optim.Rprop,
    torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adafactor, torch.optim.Adam,
]  # fmt: skip


@pytest.mark.parametrize("create", [create_loraplus_optimizer, create_riemannian_optimizer])
@pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock.__name__)
def test_any_stock_optimizer_goes_on_from_its_own_state(stock: type[Optimizer], create: Make) -> None:
    def made(model: nn.Module) -> Optimizer:
        own = {"loraplus_lr_ratio": 4} if create is create_loraplus_optimizer else {}
        return create(model, stock, lr=1e-3, **own)

    torch.manual_seed(0)
    model = adapted()
    other = copy.deepcopy(model)
    optimizer = made(model)
    run(model, optimizer, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    resumed = made(other)
    resumed.load_state_dict(saved)
    for one, its in ((model, optimizer), (other, resumed)):
        run(one, its, steps=2, seed=6)
    for (name, value), after in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, after, rtol=1e-6, atol=1e-9, msg=name)  # NAdam keeps a product in float32


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps], ids=lambda f: f.__name__)
def test_what_would_be_left_without_its_transform_is_not_copied(name: str, copied: Callable[[Any], Any]) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    with pytest.raises(
        AdapterError, match=r"cannot be copied or pickled\. Keep its state_dict\(\), make the optimizer"
    ):
        copied(optimizer)
    run(model, optimizer)
    assert isinstance(optimizer, SGD if "sgd" in name else AdamW)
    copied_state, own = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    assert copied_state["param_groups"] == own["param_groups"]
    torch.testing.assert_close(copied_state["state"], own["state"], rtol=0, atol=0)
