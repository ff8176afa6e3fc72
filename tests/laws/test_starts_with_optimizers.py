"""The law of starts and optimizers: any goes with any, and a step moves what is trained; or an error says why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError
from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from toys.adapters import STARTS, initializer_of, read_by, settings_of, stats_for
from toys.compare import assert_unchanged, everything
from toys.models import Two

LR = 1e-3
LORA_FA: dict[str, Callable[[nn.Module], Optimizer]] = {
    "exact": lambda model: create_lorafa_optimizer(model, lr=LR),
    "fold": lambda model: create_lorafa_optimizer(model, lr=LR, algorithm="fold"),
}
BOTH_FACTORS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "riemannian": lambda model: create_riemannian_optimizer(model, AdamW, lr=LR),
    "riemannian sgd": lambda model: create_riemannian_optimizer(model, SGD, lr=LR),
    "preconditioned": lambda model: create_preconditioned_adamw(model, lr=LR),
    "pro": lambda model: create_lorapro_optimizer(model, lr=LR),
    "pro sgd": lambda model: create_lorapro_optimizer(model, lr=LR, form="sgd"),
    "pro full": lambda model: create_lorapro_optimizer(model, lr=LR, form="full"),
}
MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "plus": lambda model: create_loraplus_optimizer(model, AdamW, lr=LR, loraplus_lr_ratio=4),
    **LORA_FA,
    **BOTH_FACTORS,
}
LAYERS = ("first", "second")


def fresh(start: bool | str) -> PeftModel:
    model = Two()
    stats = {name: stats_for(model.get_submodule(name).weight) for name in LAYERS}  # type: ignore[arg-type]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=list(LAYERS), init_seed=0, **settings_of(start))
    return get_peft_model(model, config, stats=read_by(start, stats))


def refusal(start: bool | str, optimizer: str) -> str | None:
    """Why the two do not go together, by what the start declares; None: they do."""
    made = initializer_of(start)
    if made.variant is not None and optimizer != "plus":
        return rf"first, adapter 'default' is {made.variant}, whose update is not the product of B and A as they are"
    if not set(made.trains) & {"A", "B"}:
        return r"No factor of adapter 'default' is trained\..* takes a stock optimizer such as torch\.optim\.AdamW"
    if made.trains == "A" and optimizer in LORA_FA:
        return r"first, adapter 'default': B is frozen and A is trained, and LoRA-FA trains B alone.* Use a stock optim"
    if made.trains == "A" and optimizer in BOTH_FACTORS:
        return r"first, adapter 'default': B is frozen, but .* moves A and B together\. Use a stock optimizer such as"
    if start == "orthogonal" and optimizer in LORA_FA:
        return r"first, adapter 'default': A has dependent rows.* which init_lora_weights='orthogonal' has not"
    return None


CASES = [(start, optimizer) for start in STARTS for optimizer in MAKERS]
REFUSED = [case for case in CASES if refusal(*case)]
MADE = [case for case in CASES if not refusal(*case)]


@pytest.mark.parametrize(("start", "optimizer"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(start: bool | str, optimizer: str) -> None:
    model = fresh(start)
    before = everything(model)
    with pytest.raises(AdapterError, match=str(refusal(start, optimizer))):
        MAKERS[optimizer](model)
    assert_unchanged(before, model)


def values(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def with_a_gradient(model: PeftModel, now: dict[str, Tensor]) -> set[str]:
    """What is trained and not held back by a zero beside it: g_A = s B^T G, g_B = s G A^T, and so on."""
    found = set()
    for name in (name for name, parameter in model.named_parameters() if parameter.requires_grad):
        beside = {part: name.replace(name.split(".")[-3], part) for part in ("lora_A", "lora_B")}
        factors = [now[key] for part, key in beside.items() if f".{part}." not in name]
        found |= {name} if all(bool(factor.any()) for factor in factors) else set()
    return found


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "optimizer"), MADE)
def test_a_step_moves_what_is_trained_and_nothing_else(start: bool | str, optimizer: str) -> None:
    model, x, target = fresh(start), torch.randn(9, 12), torch.randn(9, 14)
    outputs = model(x).detach()
    made = MAKERS[optimizer](model)
    torch.testing.assert_close(model(x), outputs, rtol=1e-5, atol=1e-5)  # where factors are folded too,
    if torch.equal(outputs, Two()(x)):  # together with what is taken out of the base
        assert torch.equal(model(x), outputs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    if optimizer in LORA_FA:
        assert not any("lora_A" in name for name in trained)
    before = now = values(model)
    for _ in range(2):
        expected = with_a_gradient(model, now)
        made.zero_grad()
        (model(x) - target).square().mean().backward()  # type: ignore[no-untyped-call]
        made.step()
        after = values(model)
        assert changed(now, after) == expected
        assert all(bool(tensor.isfinite().all()) for tensor in after.values() if tensor.is_floating_point())
        now = after
    assert changed(before, now) == trained  # what was held back by a zero has moved in the second step
    assert not torch.allclose(model(x), outputs, atol=1e-4)
