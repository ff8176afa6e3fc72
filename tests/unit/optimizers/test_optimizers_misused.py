"""Optimizers of A and B used wrongly: what is wrong is said, and nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lorafa import LoraConfig, MontecloraConfig, PeftModel, VeloraConfig, get_peft_model
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError, DivergedError, LoraError
from lorafa.layers import LoraLayer
from lorafa.optimizers import (
    LoraFAOptimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.pairs import pairs_of
from toys.models import Mlp
from toys.optimizers import adapted, batch, loss

Make = Callable[[nn.Module], Optimizer]
MAKERS: dict[str, Make] = {
    "exact": lambda model: create_lorafa_optimizer(model, lr=1e-2),
    "fold": lambda model: create_lorafa_optimizer(model, lr=1e-2, algorithm="fold"),
    "plus": lambda model: create_loraplus_optimizer(model, AdamW, lr=1e-2, loraplus_lr_ratio=4),
    "riemannian": lambda model: create_riemannian_optimizer(model, AdamW, lr=1e-2),
    "preconditioned": lambda model: create_preconditioned_adamw(model, lr=1e-2),
    "pro": lambda model: create_lorapro_optimizer(model, lr=1e-2),
    "pro sgd": lambda model: create_lorapro_optimizer(model, lr=1e-2, form="sgd"),
    "pro full": lambda model: create_lorapro_optimizer(model, lr=1e-2, form="full"),
}
EVERY = pytest.mark.parametrize("name", MAKERS)
DIVIDING = pytest.mark.parametrize("name", ["exact", "fold", "pro", "pro sgd", "pro full"])
"""Whose step divides by the scaling."""


def state(model: nn.Module) -> dict[str, Any]:
    """Everything an optimizer may change in a model when it is made."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    configs = {name: config.freeze_A for name, config in getattr(model, "peft_config", {}).items()}
    trains = {
        path: {name: adapter.trains for name, adapter in layer.adapters.items()}
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    return {"tensors": tensors, "flags": flags, "configs": configs, "trains": trains}


def refused(model: nn.Module, action: Callable[[], Any], error: type[LoraError], match: str) -> None:
    before = state(model)
    with pytest.raises(error, match=match):
        action()
    after = state(model)
    for name, tensor in before.pop("tensors").items():
        torch.testing.assert_close(after["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True)
    after.pop("tensors")
    assert after == before


def ready(model: nn.Module) -> None:
    """Gradients for a step."""
    model.zero_grad()
    loss(model, batch(next(model.parameters()).dtype)).backward()


WITH_BETAS: dict[str, Callable[..., Optimizer]] = {
    "exact": create_lorafa_optimizer,
    "fold": partial(create_lorafa_optimizer, algorithm="fold"),
    "preconditioned": create_preconditioned_adamw,
    "pro": create_lorapro_optimizer,
    "pro full": partial(create_lorapro_optimizer, form="full"),
}


@pytest.mark.parametrize("name", WITH_BETAS)
@pytest.mark.parametrize("betas", [(0.9,), (), (0.9, 0.99, 0.999), 0.9, None, (0.9, "0.99")], ids=str)
def test_betas_are_two_numbers(name: str, betas: Any) -> None:
    model, text = adapted(), r"betas must be two numbers in \[0, 1\), found"
    refused(model, lambda: WITH_BETAS[name](model, lr=1e-2, betas=betas), ConfigError, text)


@DIVIDING
def test_a_scaling_of_zero_is_refused(name: str) -> None:
    model = adapted()
    model.get_base_model().first.set_scale("default", 0.0)
    refused(model, lambda: MAKERS[name](model), AdapterError, r"first, adapter 'default': its scaling is 0")


@pytest.mark.parametrize("name", ["exact", "pro", "pro sgd"])
def test_a_scaling_that_became_zero_is_refused_before_anything_moves(name: str) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    ready(model)
    model.get_base_model().second.set_scale("default", 0.0)
    refused(model, optimizer.step, AdapterError, r"second, adapter 'default': its scaling is 0.*Nothing was changed")


@pytest.mark.parametrize("algorithm", ["exact", "fold"])
def test_an_active_adapter_that_is_not_trained_is_left_as_it_is(algorithm: str) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.base_model.set_requires_grad("other", False)
    first = model.get_base_model().first
    A, B = first.lora_A["other"].weight.clone(), first.lora_B["other"].weight.clone()
    create_lorafa_optimizer(model, lr=1e-2, algorithm=algorithm)
    assert torch.equal(first.lora_A["other"].weight, A)
    assert torch.equal(first.lora_B["other"].weight, B)
    assert not model.peft_config["other"].freeze_A
    assert model.peft_config["default"].freeze_A
    assert {name: adapter.trains for name, adapter in first.adapters.items()} == {"default": "B", "other": "AB"}


def test_the_class_does_not_take_A() -> None:
    model = adapted()
    refused(
        model,
        lambda: LoraFAOptimizer(model.parameters(), lr=1e-2, pairs=pairs_of(model)),
        ConfigError,
        r"moves B and keeps A, but was given parameters that are an A. Call create_lorafa_optimizer",
    )


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("plus", "fold")])
def test_an_adapter_merged_since_is_refused(name: str) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    ready(model)
    model.merge_adapter()
    refused(model, optimizer.step, AdapterError, r"adapter 'default' is merged, so it gets no gradient")


@EVERY
def test_factors_replaced_in_the_model_are_refused(name: str) -> None:
    """As sharding does; the optimizer would go on moving what nobody uses."""
    model = adapted()
    optimizer = MAKERS[name](model)
    holder = model.get_base_model().first.lora_B["default"]
    holder.weight = nn.Parameter(holder.weight.detach().clone())
    model.zero_grad()
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = None
    loss(model, batch()).backward()
    refused(model, optimizer.step, AdapterError, r"first: the factors of adapter 'default' are not the optimizer's")


def test_an_A_that_was_spoilt_stops_the_step_before_anything_moves() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    ready(model)
    with torch.no_grad():
        model.get_base_model().second.lora_A["default"].weight.fill_(torch.nan)
    refused(model, optimizer.step, AdapterError, r"second, adapter 'default': A \(rank 3\) holds nan or inf")
    assert not optimizer.state


@pytest.mark.parametrize("name", ["riemannian", "pro"])
def test_a_step_that_fails_leaves_the_gradients_as_they_were(name: str) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    ready(model)
    with torch.no_grad():
        model.get_base_model().second.lora_B["default"].weight.fill_(torch.nan)
    before = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    refused(model, optimizer.step, AdapterError, r"second, adapter 'default': B \(rank 3\) holds nan or inf")
    assert all(torch.equal(p.grad, before[key]) for key, p in model.named_parameters() if p.grad is not None)


def used(name: str) -> tuple[PeftModel, Optimizer]:
    """A model after one step, with gradients for the next; its four factors have three different shapes."""
    model = adapted(modules_to_save=["norm"])
    optimizer = MAKERS[name](model)
    ready(model)
    optimizer.step()
    ready(model)
    return model, optimizer


def refused_whole(model: PeftModel, optimizer: Optimizer, match: str, error: type[LoraError] = AdapterError) -> None:
    """As :func:`refused`, and the optimizer is as it was too."""
    before = copy.deepcopy(optimizer.state_dict()["state"])
    refused(model, optimizer.step, error, match)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["preconditioned", "pro full"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_gradient_that_is_not_finite_in_the_last_layer_stops_the_step_in_the_first(
    name: str, value: float, factor: str
) -> None:
    model, optimizer = used(name)
    getattr(model.get_base_model().second, f"lora_{factor}")["default"].weight.grad[0, 0] = value
    text = rf"second, adapter 'default': the gradient of {factor} holds nan or inf\. .* Nothing was changed\."
    refused_whole(model, optimizer, text, DivergedError)


@pytest.mark.parametrize("name", ["preconditioned", "pro full"])
def test_a_factor_that_was_spoilt_in_the_last_layer_stops_the_step_in_the_first(name: str) -> None:
    model, optimizer = used(name)
    with torch.no_grad():
        model.get_base_model().second.lora_B["default"].weight.fill_(torch.nan)
    refused_whole(model, optimizer, r"second, adapter 'default': B \(rank 3\) holds nan or inf")


class Sparse(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 12, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table(torch.arange(len(x)) % 5))


@pytest.mark.parametrize("name", ["exact", "preconditioned", "pro full"])
def test_sparse_gradients_are_refused(name: str) -> None:
    model = adapted(model=Sparse(), modules_to_save=["table"])
    optimizer = MAKERS[name](model)
    ready(model)
    refused(model, optimizer.step, BackendError, r"\(5, 12\) has a sparse gradient.*Make its module with sparse=False")


@pytest.mark.parametrize("saved", MAKERS)
@EVERY
def test_the_state_of_another_optimizer_is_refused(name: str, saved: str) -> None:
    one, other = adapted(), adapted()
    theirs, ours = MAKERS[saved](one), MAKERS[name](other)
    ready(one)
    theirs.step()
    if name == saved:
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)
        assert bool(ours.state) is (name != "pro sgd")  # which keeps nothing without momentum
        return
    with pytest.raises(CheckpointError, match=r"nothing was loaded"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@EVERY
def test_a_stock_optimizers_state_is_refused(name: str) -> None:
    model, other = adapted(), adapted()
    optimizer = MAKERS[name](model)
    stock = AdamW([{"params": group["params"]} for group in optimizer.param_groups], lr=1e-2)
    ready(model)
    stock.step()
    with pytest.raises(CheckpointError, match=r"The saved optimizer is a stock one, this one is .*; nothing was load"):
        MAKERS[name](other).load_state_dict(stock.state_dict())


@EVERY
@pytest.mark.parametrize("bad", [{}, {"state": {}}], ids=str)
def test_what_is_no_state_is_refused(name: str, bad: Any) -> None:
    with pytest.raises(CheckpointError, match=r"An optimizer's state has 'state' and 'param_groups', this is"):
        MAKERS[name](adapted()).load_state_dict(bad)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "pro sgd"])
def test_an_incomplete_state_is_refused(name: str) -> None:
    model = adapted()
    optimizer = MAKERS[name](model)
    ready(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    next(iter(saved["state"].values())).pop("exp_avg_sq")
    with pytest.raises(CheckpointError, match=r"lacks exp_avg_sq; nothing was loaded"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"form": "sgd", "betas": (0.5, 0.9)}, "betas and eps are Adam's"),
        ({"form": "sgd", "eps": 1e-6}, "betas and eps are Adam's"),
        ({"momentum": 0.9}, "momentum belongs to form='sgd', and form='adamw'"),
        ({"form": "full", "momentum": 0.9}, "momentum belongs to form='sgd', and form='full'"),
    ],
    ids=str,
)
def test_settings_of_another_form_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        create_lorapro_optimizer(adapted(), lr=1e-2, **settings)


def test_settings_that_would_do_nothing_are_refused() -> None:
    model = adapted()

    def plus(optimizer_cls: Any = AdamW, **settings: Any) -> Any:
        return lambda: create_loraplus_optimizer(model, optimizer_cls, lr=1e-2, loraplus_lr_ratio=4, **settings)

    def riemannian(optimizer_cls: Any = AdamW, **settings: Any) -> Any:
        return lambda: create_riemannian_optimizer(model, optimizer_cls, lr=1e-2, **settings)

    for action, match in [
        (plus(torch.optim.Rprop, weight_decay=0.5), "Rprop has no weight_decay"),
        (riemannian(torch.optim.Rprop, weight_decay=0.5), "Rprop has no weight_decay"),
        (plus(loraplus_weight_decay=-1.0), "loraplus_weight_decay must be a number >= 0, found -1.0"),
        (riemannian(weight_decay=-1.0), "weight_decay must be a number >= 0, found -1.0"),
        (plus(fast_vectors="no"), "fast_vectors must be True or False, found 'no'"),
        (plus("AdamW"), r"optimizer_cls must be a class such as torch.optim.AdamW, found 'AdamW' \(str\)"),
        (riemannian("AdamW"), r"optimizer_cls must be a class such as torch.optim.AdamW, found 'AdamW' \(str\)"),
        (lambda: create_lorafa_optimizer(model, correct_bias="no"), "correct_bias must be True or False, found 'no'"),
    ]:
        refused(model, action, ConfigError, match)


@EVERY
@pytest.mark.parametrize("model", [None, "model", {}], ids=str)
def test_what_is_no_model_is_refused(name: str, model: Any) -> None:
    with pytest.raises(AdapterError, match="An optimizer is made for a model with adapters, found"):
        MAKERS[name](model)


@EVERY
def test_factors_without_values_are_refused(name: str) -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=3, target_modules=["first"]), low_cpu_mem_usage=True)
    with pytest.raises(BackendError, match="is on the meta device and has no values"):
        MAKERS[name](model)


def test_the_rank_is_that_of_the_config_and_values_are_told_apart_from_texts() -> None:
    model = adapted(rank_pattern={"second": 2})
    for said, match in [
        (2, "r=2 was given, but the adapters have r=3"),
        ("3", "r='3' was given, but the adapters have"),
    ]:
        refused(model, lambda said=said: create_lorafa_optimizer(model, r=said), ConfigError, match)  # type: ignore[misc]
    create_lorafa_optimizer(model, r=3)


def test_a_rank_above_the_inputs_is_told_what_to_lower() -> None:
    model = adapted(r=13)
    refused(model, lambda: create_lorafa_optimizer(model), AdapterError, "A has 13 rows of 12 numbers.*Lower the rank")


def test_a_part_of_the_model_without_configs_is_warned_of() -> None:
    model: PeftModel = adapted()
    with pytest.warns(UserWarning, match="a file of theirs will not say that A is frozen. Pass the PeftModel itself"):
        create_lorafa_optimizer(model.get_base_model().first)


def test_a_model_that_waits_for_gradients_of_A_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = adapted()
        wrapped = nn.parallel.DistributedDataParallel(model)
        refused(model, lambda: create_lorafa_optimizer(wrapped), AdapterError, "Make the optimizer before that")
        create_lorafa_optimizer(nn.parallel.DistributedDataParallel(adapted(freeze_A=True)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("max_norm", [-1, float("nan"), "1", None], ids=str)
def test_clipping_to_no_length_is_refused(max_norm: Any) -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model)
    assert isinstance(optimizer, LoraFAOptimizer)
    with pytest.raises(ConfigError, match="max_norm must be a number >= 0"):
        optimizer.row_space.clip_norm_(max_norm)


def test_arguments_that_only_some_of_the_adapters_have_are_refused() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5.0, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ConfigError, match=r"r=3 was given, but the adapters have r=2, 3\. .* from each layer: leave it"
    ):
        create_lorafa_optimizer(model, r=3, lr=1e-3)
    create_lorafa_optimizer(model, lora_alpha=5.0, lr=1e-3)


@pytest.mark.parametrize("name", ["exact", "fold"])
@pytest.mark.parametrize("inside", ["velora", "monteclora"])
def test_lora_fa_refuses_formulas_about_the_gradient_of_A(inside: str, name: str) -> None:
    settings = {"velora": VeloraConfig(num_groups=2), "monteclora": MontecloraConfig()}[inside]
    config = LoraConfig(r=2, target_modules=["first"], use_dora=True, **{f"{inside}_config": settings})  # type: ignore[arg-type]
    text = rf"first, adapter 'default' is dora over {inside}, which is about the gradient of A, and LoRA-FA freezes A"
    model = get_peft_model(Mlp(), config)
    refused(model, lambda: MAKERS[name](model), AdapterError, text)
