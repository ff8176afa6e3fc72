"""The learning rate of every step: transformers' course, and a warm-up whose first step trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.train.fit import steps_in_all, training_arguments
from lorafa.train.rates import scheduler
from lorafa.train.settings.optim import schedule_of_trainer
from lorafa.train.settings.schedules import SCHEDULES

LR = 0.5


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)


def rates(kind: str, warmup: int, steps: int, own: dict[str, Any] | None = None, make: Any = scheduler) -> list[float]:
    optim = optimizer()
    if make is scheduler:
        course = scheduler(kind, optim, warmup, steps, own)
    else:
        course = get_scheduler(kind, optim, warmup, steps, own)
    found = []
    for _ in range(steps):
        found.append(optim.param_groups[0]["lr"])
        optim.step()
        course.step()
    return found


def test_every_schedule_of_transformers_has_its_name_here() -> None:
    assert set(SCHEDULES.names()) == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_is_made_with_the_settings_it_has_by_default(name: str) -> None:
    arguments = schedule_of_trainer(compose([f"optim.schedule={name}", "optim.lr=0.5", "train.eval_every=1"]).optim)
    course = scheduler(arguments["lr_scheduler_type"], optimizer(), 2, 20, arguments["lr_scheduler_kwargs"])
    assert hasattr(course, "state_dict")


@pytest.mark.parametrize("name", [name for name in SCHEDULES.names() if SCHEDULES.get(name).warms])
def test_a_warm_up_ends_at_the_whole_rate_and_what_follows_is_transformers_own(name: str) -> None:
    arguments = schedule_of_trainer(compose([f"optim.schedule={name}", "optim.lr=0.5", "optim.warmup=4"]).optim)
    kind, own = arguments["lr_scheduler_type"], arguments["lr_scheduler_kwargs"]
    ours = rates(kind, 4, 20, own)
    theirs = rates(kind, 4, 20, {**own, "num_decay_steps": 2} if "num_decay_steps" in (own or {}) else own, make=None)
    assert 0 < ours[0] < ours[1] < ours[2] < ours[3] == LR
    assert ours[4:] == theirs[4:]


def test_the_steps_of_a_warm_up_rise_by_equal_parts() -> None:
    assert rates("linear", 4, 10)[:5] == [LR * part / 4 for part in (1, 2, 3, 4, 4)]
    assert rates("constant_with_warmup", 0, 3) == [LR] * 3


def test_a_training_of_one_step_trains() -> None:
    warmup = training_arguments(compose(["train.steps=1"]), "x").get_warmup_steps(1)  # type: ignore[arg-type]
    assert rates("linear", warmup, 1) == [LR]


def test_the_steps_of_passes_are_counted_as_transformers_counts_them() -> None:
    config = compose(["train.steps=null", "train.epochs=1.5", "train.batch_size=2", "train.accumulation=3"])
    assert steps_in_all(config, 20) == 6  # 10 batches, 4 steps a pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optim.schedule=linaer", r"optim\.schedule has no value 'linaer'\. Did you mean 'linear'\? Pass one of: 'con"),
        ("optim.power=2", r"no setting 'optim\.power' for optim=adamw .* belongs to optim\.sched"),
        ("optim.schedule=greedy optim.warmup=3 train.eval_every=1", r"optim\.warmup=3 would change nothing: optim"),
        ("optim.schedule=polynomial optim.lr=1e-8", r"optim\.lr_end=1e-07 is not below optim\.lr=1e-08"),
        ("optim.schedule=cosine_with_min_lr optim.min_lr=1e-5 optim.min_lr_rate=0.1", r"optim\.min_lr=1e-05 and min_l"),
        ("optim.schedule=warmup_stable_decay optim.warmup=40 optim.num_decay_steps=60", r"are more than the whole"),
        ("optim.schedule=cosine optim.num_cycles=0", r"optim\.num_cycles must be a number > 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides.split())
