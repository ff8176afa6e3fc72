"""LoRA+, Riemannian, LoRA-One's AdamW and LoRA-Pro in use: groups, states, what they work beside, what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

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
from toys.adapters import adapted as adapted_kind
from toys.layers import KINDS, input_for
from toys.models import Mlp
from toys.optimizers import adapted, batch, loss

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
    before = [(pair.A.clone(), pair.B.clone()) for pair in pairs_of(model)]
    undamped = {"riemannian": {"reg": 0.0}, "riemannian sgd": {"reg": 0.0}}.get(name, {})
    run(model, MAKERS[name](model, lr=1e-4, **({"damping": 0.0} if "pro" in name else undamped)), 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for pair, (A, B) in zip(pairs_of(model), before, strict=True):
        assert not torch.equal(pair.A, A)
        assert not torch.equal(pair.B, B)


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


@pytest.mark.matrix(4)
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


LORA_FA: dict[str, Make] = {
    "exact": lambda model, **s: create_lorafa_optimizer(model, **{"lr": 1e-2} | s),
    "fold": lambda model, **s: create_lorafa_optimizer(model, algorithm="fold", **{"lr": 1e-2} | s),
}
ALL = pytest.mark.parametrize("name", [*MAKERS, *LORA_FA])


def make(name: str, model: nn.Module) -> Optimizer:
    return (MAKERS | LORA_FA)[name](model)


@ALL
def test_the_memory_layout_of_factors_does_not_change_the_steps(name: str) -> None:
    """Fused kernels walk parameters, gradients and moments by address."""
    results = []
    for transposed in (False, True):
        torch.manual_seed(0)
        model = adapted(torch.float32)
        for pair in pairs_of(model):
            if transposed:
                pair.A.data, pair.B.data = pair.A.data.T.contiguous().T, pair.B.data.T.contiguous().T
        run(model, make(name, model))
        results.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@ALL
def test_convolutions_in_channels_last_take_the_same_steps(name: str) -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), config).double().to(memory_format=layout)
        optimizer, x = make(name, model), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["exact", "preconditioned", "pro full"])
def test_moments_of_half_precision_factors_are_loaded_as_they_were(name: str) -> None:
    model = adapted(torch.float32)
    for pair in pairs_of(model):
        pair.A.data, pair.B.data = pair.A.data.bfloat16(), pair.B.data.bfloat16()
    optimizer, other = make(name, model), make(name, model)
    run(model, optimizer)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert other.state[parameter][key].dtype is torch.float32
            assert torch.equal(other.state[parameter][key], state[key])


@pytest.mark.parametrize("name", ["exact", "fold", "preconditioned", "pro full", "plus"])
def test_a_copy_of_model_and_optimizer_trains_as_they_do(name: str) -> None:
    model = adapted()
    optimizer = make(name, model)
    run(model, optimizer)
    twin, twins = copy.deepcopy((model, optimizer))
    unpickled, its = pickle.loads(pickle.dumps((model, optimizer)))
    for each, steps in ((model, optimizer), (twin, twins), (unpickled, its)):
        run(each, steps, 2)
    for one, two, three in zip(model.parameters(), twin.parameters(), unpickled.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@ALL
def test_several_active_adapters_are_trained_together(name: str) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    optimizer = make(name, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, optimizer)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


@MOVING_TOGETHER
def test_a_layer_that_is_frozen_altogether_is_left_out(name: str) -> None:
    model = adapted()
    first = pairs_of(model)[0]
    for factor in (first.A, first.B):
        factor.requires_grad_(False)
    optimizer = make(name, model)
    run(model, optimizer)
    assert id(first.B) not in {id(p) for group in optimizer.param_groups for p in group["params"]}


# ---- what they refuse


@ALL
def test_an_adapter_that_is_not_trained_is_refused(name: str) -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"No factor of adapter 'default' is trained. Load it with is_trainable"):
        make(name, model)


@ALL
def test_a_merged_adapter_is_refused(name: str) -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"adapter 'default' is merged.*unmerge_adapter"):
        make(name, model)


@ALL
def test_an_adapter_that_took_the_name_of_another_is_refused(name: str) -> None:
    model = adapted()
    optimizer = make(name, model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=3, target_modules=["first", "second"]))
    model.set_adapter("default")
    loss(model, batch()).backward()
    with pytest.raises(AdapterError, match=r"made for an adapter 'default' that was deleted; another one has"):
        optimizer.step()


@ALL
def test_parameters_that_were_replaced_are_refused(name: str) -> None:
    """As sharding does after the optimizer is made."""
    model = adapted()
    optimizer = make(name, model)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(AdapterError, match=r"factors of adapter 'default' are not the optimizer's parameters"):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("plus", "preconditioned", "pro full")])
def test_where_a_stock_optimizer_moves_a_divergence_is_named_in_the_step_after_it(name: str) -> None:
    model = adapted()
    optimizer = make(name, model)
    loss(model, batch()).backward()
    pairs_of(model)[1].B.grad.fill_(float("nan"))
    optimizer.step()
    with pytest.raises(AdapterError, match=r"second, adapter 'default': . \(rank 3\) holds nan or inf"):
        optimizer.step()


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
    with pytest.raises(AdapterError, match=r"A is frozen, but .* moves A and B together. Use create_lorafa_optimizer"):
        MAKERS[name](model)


@pytest.mark.parametrize("name", ["riemannian", "pro adamw", "pro sgd"])
def test_a_closure_is_refused_where_it_would_escape_the_preconditioning(name: str) -> None:
    optimizer = MAKERS[name](adapted())
    with pytest.raises(ConfigError, match=r"A closure computes gradients inside the step"):
        optimizer.step(lambda: 1.0)


def test_lbfgs_is_refused() -> None:
    text = r"LBFGS computes gradients inside its step.* Use torch\.optim\.AdamW, or another class whose step"
    with pytest.raises(ConfigError, match=text):
        create_riemannian_optimizer(adapted(), torch.optim.LBFGS, lr=1.0)


@ALL
def test_another_active_adapter_is_refused(name: str) -> None:
    model = adapted()
    optimizer = make(name, model)
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


@pytest.mark.parametrize("name", ["preconditioned", "pro adamw", "pro full"])
@pytest.mark.parametrize("settings", [{"eps": -1.0}, {"betas": (2.0, 2.0)}, {"weight_decay": -1.0}], ids=str)
def test_numbers_of_adam_out_of_range_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be"):
        MAKERS[name](adapted(), **settings)
