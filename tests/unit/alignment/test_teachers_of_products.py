"""Teachers that average updates: in the space of the product, whatever basis the factors are in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.alignment.teachers.anchor import Anchor
from lorafa.alignment.teachers.ema import EMA
from lorafa.errors import AdapterError, ConfigError
from toys.adapters import train
from toys.compare import close
from toys.models import Two


def student(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Two().double(), LoraConfig(target_modules=["first", "second"], r=3, **settings))
    train(model, 0.3)
    return model


def updates(model: Any, teacher: Any) -> list[Tensor]:
    """The update of each layer as the teacher has it."""
    with teacher.running(model):
        return [layer.adapters["default"].product().detach() for _, layer in model.base_model.lora_layers()]


def own_updates(model: Any) -> list[Tensor]:
    return [layer.adapters["default"].product().detach() for _, layer in model.base_model.lora_layers()]


def other_basis(model: Any) -> None:
    """(R A, B R^-1): the same updates by other factors."""
    for _, layer in model.base_model.lora_layers():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        R = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] * torch.tensor([0.8, 1.0, 1.2]).double()
        with torch.no_grad():
            B.copy_(B @ torch.linalg.inv(R))
            A.copy_(R @ A)


def test_a_student_that_stays_is_its_own_teacher_in_any_basis() -> None:
    model = student()
    teacher = EMA()
    teacher.begin(model)
    for _ in range(20):
        other_basis(model)
        teacher.after_step(model)
    for found, wanted in zip(updates(model, teacher), own_updates(model), strict=True):
        close(found, wanted, 1e-11)
    assert teacher.discarded < 1e-20


def test_the_average_is_that_of_updates_as_far_as_the_rank_goes() -> None:
    model = student()
    teacher = EMA(ema_beta=0.25)
    teacher.begin(model)
    before = own_updates(model)
    train(model, 0.3)
    teacher.after_step(model)
    for found, one, two in zip(updates(model, teacher), before, own_updates(model), strict=True):
        wanted = 0.75 * one + 0.25 * two
        U, S, Vh = torch.linalg.svd(wanted)
        close(found, U[:, :3] * S[:3] @ Vh[:3], 1e-10)
    assert 0 < teacher.discarded < 0.5


def test_what_is_lost_is_a_share_of_the_updates_with_their_scalings() -> None:
    model = student(alpha_pattern={"first": 40.0, "second": 2.0})
    teacher = EMA(ema_beta=0.25)
    teacher.begin(model)
    before = own_updates(model)
    train(model, 0.3)
    teacher.after_step(model)
    lost = whole = 0.0
    for found, one, two in zip(updates(model, teacher), before, own_updates(model), strict=True):
        wanted = 0.75 * one + 0.25 * two
        lost, whole = lost + float((wanted - found).square().sum()), whole + float(wanted.square().sum())
    assert teacher.discarded == pytest.approx(lost / whole, rel=1e-9)


def test_a_slow_student_is_followed_closely() -> None:
    """A student whose update grows by 5 % a step along its own directions is averaged exactly."""
    model = student()
    teacher = EMA(ema_beta=0.05)
    teacher.begin(model)
    exact = [update.clone() for update in own_updates(model)]
    for _ in range(20):
        with torch.no_grad():
            for _, layer in model.base_model.lora_layers():
                layer.lora_B["default"].weight.mul_(1.05)
        teacher.after_step(model)
        exact = [0.95 * old + 0.05 * new for old, new in zip(exact, own_updates(model), strict=True)]
    for found, wanted in zip(updates(model, teacher), exact, strict=True):
        close(found, wanted, 1e-10)


def test_a_student_that_turns_by_a_twentieth_a_step_is_averaged_to_half_a_hundredth() -> None:
    """What the rank cannot hold of each average does not add up: 0.6 % of the exact one after twenty steps."""
    model, generator = student(), torch.Generator().manual_seed(1)
    teacher = EMA(ema_beta=0.05)
    teacher.begin(model)
    exact = [update.clone() for update in own_updates(model)]
    for _ in range(20):
        with torch.no_grad():
            for _, layer in model.base_model.lora_layers():
                for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                    moved = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                    factor.add_(0.05 / 2**0.5 * moved * factor.norm() / moved.norm())
        teacher.after_step(model)
        exact = [0.95 * old + 0.05 * new for old, new in zip(exact, own_updates(model), strict=True)]
    for found, wanted in zip(updates(model, teacher), exact, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.006


@pytest.mark.parametrize("start", [True, "pissa"])
def test_an_anchor_stands_between_the_student_and_where_it_began(start: bool | str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["first"], r=3, init_lora_weights=start)
    model = get_peft_model(Two().double(), config)
    teacher = Anchor(share=0.25)
    teacher.begin(model)
    train(model, 0.05)
    lost = teacher.refresh(model).discarded
    (found,), (own,) = updates(model, teacher), own_updates(model)
    if start is True:  # it began from the base: a quarter of the student
        close(found, 0.25 * own, 1e-10)
        assert lost < 1e-20
    else:  # s B0 A0 is taken off; what the rank cannot hold of the sum is said
        assert float((found - 0.25 * own).norm() / own.norm()) < 0.5
        assert 0 < lost < 0.05


def test_a_frozen_A_is_averaged_in_B_alone() -> None:
    model = student(freeze_A=True)
    teacher = EMA(ema_beta=0.5)
    teacher.begin(model)
    before = own_updates(model)
    train(model, 0.3)
    teacher.after_step(model)
    for found, one, two in zip(updates(model, teacher), before, own_updates(model), strict=True):
        close(found, 0.5 * (one + two), 1e-12)


@pytest.mark.parametrize("teacher", [EMA(), Anchor()])
def test_what_is_no_product_is_refused(teacher: Any) -> None:
    with pytest.raises(AdapterError, match=rf"align={teacher.name} averages the product of A and B.*first' \(dora\)"):
        teacher.begin(student(use_dora=True))
    with pytest.raises(AdapterError, match="keeps another state of the student's adapters, and this model trains none"):
        teacher.begin(nn.Linear(2, 2).requires_grad_(False))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="ema_beta must be a number in"):
        EMA(ema_beta=0.0)
    with pytest.raises(ConfigError, match="share must be a number in"):
        Anchor(share=1.5)
