"""LoRA+, Riemannian, LoRA-One's AdamW and LoRA-Pro in use: groups, states, what they work beside, what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from adapter_toys import KINDS, input_for
from adapter_toys import adapted as adapted_kind
from lorafa import LoraConfig, get_peft_model
from lorafa.errors import AdapterError, CheckpointError, ConfigError
from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.pairs import pairs_of
from optimizer_toys import Mlp, adapted, batch, loss

Make = Callable[..., Optimizer]
MAKERS: dict[str, Make] = {
    "riemannian": lambda model, **s: create_riemannian_optimizer(model, AdamW, **{"lr": 1e-2} | s),
    "riemannian sgd": lambda model, **s: create_riemannian_optimizer(model, SGD, **{"lr": 1e-2} | s),
    "preconditioned": lambda model, **s: create_preconditioned_adamw(model, **{"lr": 1e-2} | s),
    "pro adamw": lambda model, **s: create_lorapro_optimizer(model, **{"lr": 1e-2} | s),
    "pro zero": lambda model, **s: create_lorapro_optimizer(model, X="zero", **{"lr": 1e-2} | s),
    "pro symmetric": lambda model, **s: create_lorapro_optimizer(model, X="symmetric", **{"lr": 1e-2} | s),
    "pro sgd": lambda model, **s: create_lorapro_optimizer(model, form="sgd", **{"lr": 1e-2} | s),
    "pro full": lambda model, **s: create_lorapro_optimizer(model, form="full", **{"lr": 1e-2} | s),
    "plus": lambda model, **s: create_loraplus_optimizer(model, AdamW, **{"lr": 1e-2, "loraplus_lr_ratio": 16} | s),
}
EVERY = pytest.mark.parametrize("name", MAKERS)
MOVING_TOGETHER = pytest.mark.parametrize("name", [name for name in MAKERS if name != "plus"])


def run(model: nn.Module, optimizer: Optimizer, steps: int = 3, seed: int = 5) -> float:
    torch.manual_seed(seed)
    dtype = pairs_of(model)[0].layer.get_base_layer().weight.dtype
    data = batch(dtype)
    value = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, data)
        value.backward()
        optimizer.step()
    return value.item()


@EVERY
def test_adapters_and_what_is_trained_beside_them_move_and_nothing_else(name: str) -> None:
    model = adapted(use_dora=True, bias="lora_only", modules_to_save=["norm"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MAKERS[name](model)
    run(model, optimizer)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(trained)


@EVERY
def test_training_from_the_usual_start_lowers_the_loss(name: str) -> None:
    """B is zero there, and both Gram matrices of B with it."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp().double(), LoraConfig(r=3, target_modules=["first", "second"]))
    optimizer = MAKERS[name](model)
    first = run(model, optimizer, 1)
    assert run(model, optimizer, 30) < first


@EVERY
def test_embeddings_train_from_the_usual_start_on_fewer_tokens_than_the_rank(name: str) -> None:
    """A is zero there, and then has as many independent columns as tokens were seen."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4)), LoraConfig(r=8, target_modules=["0", "1"])
    )
    optimizer, losses = MAKERS[name](model, lr=1e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        value = model(torch.tensor([[1, 2, 3]])).square().sum()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


@EVERY
def test_dependent_rows_and_columns_do_not_stop_a_step(name: str) -> None:
    """In float32 rounding makes the Gram matrices indefinite."""
    torch.manual_seed(0)
    model = adapted(torch.float32, r=8)
    with torch.no_grad():
        for pair in pairs_of(model):
            pair.A.copy_(10 * torch.randn(8, 1) * pair.A[:1])
            pair.B.copy_(10 * torch.randn(1, 8) * pair.B[:, :1])
    undamped = {"riemannian": {"reg": 0.0}, "riemannian sgd": {"reg": 0.0}}.get(name, {})
    run(model, MAKERS[name](model, lr=1e-4, **({"damping": 0.0} if "pro" in name else undamped)), 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@EVERY
def test_resuming_is_bit_equal(name: str) -> None:
    whole = adapted(torch.float32)
    start = copy.deepcopy(whole)
    optimizer = MAKERS[name](whole)
    run(whole, optimizer, 2, seed=1)
    saved_model, saved = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, 3, seed=2)
    start.load_state_dict(saved_model)
    resumed = MAKERS[name](start)
    resumed.load_state_dict(saved)
    run(start, resumed, 3, seed=2)
    for key, value in start.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_can_be_stepped_on(name: str, kind: str) -> None:
    model = adapted_kind(kind)
    optimizer = MAKERS[name](model, lr=1e-3)
    model(input_for(kind)).square().sum().backward()
    before = [(pair.A.clone(), pair.B.clone()) for pair in pairs_of(model)]
    optimizer.step()
    for pair, (A, B) in zip(pairs_of(model), before, strict=True):
        assert pair.A.isfinite().all()
        assert pair.B.isfinite().all()
        assert not torch.equal(pair.B, B)
        assert not torch.equal(pair.A, A)


@MOVING_TOGETHER
def test_a_pair_without_gradients_is_left_alone(name: str) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    first = pairs_of(model)[0]
    loss(model, batch()).backward()
    first.A.grad = first.B.grad = None
    before = first.A.clone(), first.B.clone()
    optimizer.step()
    assert torch.equal(first.A, before[0])
    assert torch.equal(first.B, before[1])


def test_lora_plus_gives_B_its_rate_and_every_parameter_one_group() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.norm = nn.Embedding(5, 12), nn.Linear(12, 10), nn.LayerNorm(10)

    config = LoraConfig(r=3, target_modules=["embed", "first"], modules_to_save=["norm"], bias="all", use_dora=True)
    model = get_peft_model(Lookup(), config)
    arguments: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 8, "weight_decay": 0.1}
    optimizer = create_loraplus_optimizer(model, AdamW, **arguments)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    pairs = {pair.path.rpartition(".")[2]: pair for pair in pairs_of(model)}
    assert found[id(pairs["first"].A)] == (1e-3, 0.1)
    assert found[id(pairs["first"].B)] == (8e-3, 0.1)
    assert found[id(pairs["embed"].A)] == found[id(pairs["embed"].B)] == (1e-6, 0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    assert all(found[id(p)] == (1e-3, 0.0) for p in vectors)
    fast = create_loraplus_optimizer(model, AdamW, fast_vectors=True, **arguments)
    rates = {id(p): g["lr"] for g in fast.param_groups for p in g["params"]}
    assert all(rates[id(p)] == 8e-3 for p in vectors)


# ---- what they refuse


@EVERY
def test_a_model_without_adapters_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match=r"has no layer with an active adapter"):
        MAKERS[name](Mlp())


@EVERY
def test_a_negative_learning_rate_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"lr must be a number >= 0"):
        MAKERS[name](adapted(), lr=-1e-3)


@MOVING_TOGETHER
def test_a_frozen_A_is_refused(name: str) -> None:
    model = adapted()
    create_lorafa_optimizer(model, lr=1e-3)
    with pytest.raises(AdapterError, match=r"A is frozen, but .* moves A and B together"):
        MAKERS[name](model)


@pytest.mark.parametrize("name", ["riemannian", "pro adamw", "pro sgd"])
def test_a_closure_is_refused_where_it_would_escape_the_preconditioning(name: str) -> None:
    optimizer = MAKERS[name](adapted())
    with pytest.raises(ConfigError, match=r"A closure computes gradients inside the step"):
        optimizer.step(lambda: 1.0)


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LBFGS computes gradients inside its step"):
        create_riemannian_optimizer(adapted(), torch.optim.LBFGS, lr=1.0)


@MOVING_TOGETHER
def test_another_active_adapter_is_refused(name: str) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    loss(model, batch()).backward()
    with pytest.raises(AdapterError, match=r"made for adapter 'default', active now: 'other'"):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in MAKERS if "sgd" not in name])
def test_a_state_of_other_shapes_is_refused(name: str) -> None:
    small, large = adapted(), adapted(target_modules=["first"], r=4)
    optimizer, other = MAKERS[name](small), MAKERS[name](large)
    run(small, optimizer)
    with pytest.raises(CheckpointError, match=r"nothing was loaded"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize(("settings", "match"), [({"form": "half"}, "form"), ({"X": "none"}, "X"),
                                                 ({"damping": -1.0}, "damping")])  # fmt: skip
def test_settings_lora_pro_does_not_know_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        create_lorapro_optimizer(adapted(), lr=1e-3, **settings)
