"""The learning rate of every step, as transformers has it but for the warm-up: its first step has a rate above 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lorafa.train.settings.optim import steps_of


def scheduler(kind: str, optimizer: Optimizer, warmup: int, steps: int, own: Mapping[str, Any] | None) -> Any:
    """Schedule of an optimizer over so many steps.

    Step k of a warm-up over W steps (k = 1 ... W) has the rate that transformers gives step k + 1, the last of them the
    whole rate. Where transformers' own warm-up starts above 0 it stays as it is, and so do all later steps. Schedules
    without a warm-up are transformers'.

    Args:
        kind: transformers' name.
        own: settings of the schedule by transformers' names; ``num_decay_steps`` below 1 is a share of ``steps``.
    """
    settings = dict(own or {})
    if "num_decay_steps" in settings:
        settings["num_decay_steps"] = steps_of(settings["num_decay_steps"], steps)
    make = partial(
        get_scheduler,
        kind,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=settings or None,
    )
    rate = optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"])
    made = make(optimizer=torch.optim.SGD([torch.zeros(1)], lr=float(rate)))
    if not isinstance(made, LambdaLR):  # it goes by a measured loss, and keeps the optimizer
        return make(optimizer=optimizer)
    share = made.lr_lambdas[0]
    return LambdaLR(optimizer, share if share(0) > 0 or not warmup else partial(_rising, share, warmup))


def _rising(share: Callable[[int], float], warmup: int, step: int) -> float:
    """The share of the whole rate in a step counted from 0."""
    if step + 1 == warmup:
        return 1.0
    return share(step + 1 if step < warmup else step)
