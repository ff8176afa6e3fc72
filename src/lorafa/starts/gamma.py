"""How large the first step of a start from gradients is to be: tried on held-out rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from lorafa.backends.offload import device_of
from lorafa.calibration.batches import moved, require_batches
from lorafa.calibration.loss import Loss, causal_loss, default_loss, require_label, scalar
from lorafa.calibration.processes import gathered, together
from lorafa.config import LoraConfig
from lorafa.errors import CalibrationError, warn
from lorafa.models.modes import evaluating
from lorafa.peft_model import get_peft_model
from lorafa.starts.statistics import Statistics

GAMMAS = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
"""What ``stable_gamma="auto"`` tries."""


def best_gamma(
    model: nn.Module, config: LoraConfig, stats: Statistics, heldout: Sequence[Any], *, loss: Loss | None = None
) -> LoraConfig:
    """The config with the ``stable_gamma`` of :data:`GAMMAS` whose start has the smallest loss on held-out batches.

    Every trial puts the adapter on and runs over the batches. Warns if the best is the largest tried, for
    then no step may be better than this one, or the smallest, for then a larger step may be.

    Raises:
        CalibrationError: ``heldout`` is no sequence of batches, or no trial has a finite loss.
    """
    require_batches("heldout", heldout)
    losses, flags = {}, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for gamma in GAMMAS:
        trial = replace(config, init_config=replace(config.init_config, stable_gamma=gamma))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the layers that fall back come with the start that is kept
            adapted = get_peft_model(model, trial, stats=stats)
        try:
            losses[gamma] = _mean_loss(adapted, heldout, loss or default_loss(adapted))
        finally:
            adapted.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
    finite = {gamma: value for gamma, value in losses.items() if math.isfinite(value)}
    if not finite:
        raise CalibrationError(
            f"The loss on the held-out rows is not finite for any gamma from {GAMMAS[0]:g} to {GAMMAS[-1]:g}. Check "
            "the rows, and that the model's own loss on them is finite."
        )
    best = min(finite, key=finite.__getitem__)
    if best == GAMMAS[0]:
        warn(
            f"stable_gamma='auto': the loss falls down to the smallest gamma tried, {best:g}: a larger step than any "
            f"may be better. Compare it with a smaller number, stable_gamma={best / 2:g}."
        )
    if best == GAMMAS[-1]:
        warn(
            f"stable_gamma='auto': the loss falls up to the largest gamma tried, {best:g}: a smaller step than any may "
            "be better, and the default start none at all."
        )
    return replace(config, init_config=replace(config.init_config, stable_gamma=best))


def _mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float:
    """Of the batches of all processes, in which it is the same number."""
    device, losses = device_of(model), []
    with together(), evaluating(model):
        for number, batch in enumerate(batches, 1):
            batch = moved(batch, device)
            if loss is causal_loss:
                require_label(model, batch, f"batch {number} of heldout")
            losses.append(float(scalar(loss(model, batch))))
    losses = list(chain.from_iterable(gathered(losses)))
    if not losses:
        raise CalibrationError("heldout is empty: there is no loss to compare. Pass two to eight rows.")
    return sum(losses) / len(losses)
