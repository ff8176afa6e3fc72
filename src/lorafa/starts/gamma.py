"""How large the first step of a start from gradients is to be: tried on held-out rows."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lorafa.backends.offload import device_of
from lorafa.calibration.batches import moved, require_batches
from lorafa.calibration.loss import Loss, causal_loss, default_loss, require_label, scalar
from lorafa.calibration.processes import together
from lorafa.errors import CalibrationError, warn
from lorafa.models.modes import evaluating
from lorafa.peft_model import PeftModel
from lorafa.processes import gathered
from lorafa.surgery.resolve import Resolved
from lorafa.surgery.walk import adapter_names, hosts
from lorafa.variants import variant_types

GAMMAS = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
"""What ``stable_gamma="auto"`` tries."""


def best_gamma(
    resolved: Resolved, stats: Mapping[str, Mapping[str, Tensor]], heldout: Sequence[Any], *, loss: Loss | None = None
) -> Resolved:
    """The config with the ``stable_gamma`` of :data:`GAMMAS` whose start has the smallest loss on held-out batches.

    The adapter is put on once: s B A is proportional to 1 / gamma, so that each trial is another scaling. A formula
    with tensors of its own (DoRA's magnitudes) starts them from s B A, and is put on for each trial anew.

    Warns if the best is the largest tried, for then no step may be better than this one, or the smallest, for then a
    larger step may be.

    Raises:
        CalibrationError: ``heldout`` is no sequence of batches, or no trial has a finite loss.
    """
    require_batches("heldout", heldout)
    wrapped, losses = PeftModel(resolved.model), {}
    at_once = all(variant.plain for variant in variant_types(resolved.config))
    name = next(name for count in itertools.count() if (name := f"trial_{count}") not in adapter_names(resolved.model))
    for tried in (GAMMAS,) if at_once else [(gamma,) for gamma in GAMMAS]:
        with _put_on(wrapped, name, _with_gamma(resolved, tried[0]), stats):
            loss = loss or default_loss(wrapped)
            layers = [layer for _, layer in wrapped.base_model.lora_layers() if name in layer.adapters]
            scalings = [layer.scaling[name] for layer in layers]
            for gamma in tried:
                for layer, scaling in zip(layers, scalings, strict=True):
                    layer.scaling[name] = scaling * (tried[0] / gamma)
                losses[gamma] = _mean_loss(wrapped, heldout, loss)
    finite = {gamma: value for gamma, value in losses.items() if math.isfinite(value)}
    if not finite:
        raise CalibrationError(
            f"The loss on the held-out rows is not finite for any gamma from {GAMMAS[0]:g} to {GAMMAS[-1]:g}. Check "
            "the rows, and that the model's own loss on them is finite."
        )
    if len(set(losses.values())) == 1:
        usual = type(resolved.config.init_config).stable_gamma
        warn(
            f"stable_gamma='auto': the loss on the held-out rows is the same for every gamma, so the start makes no "
            f"difference there; stable_gamma={usual:g} is kept. Check that the rows reach the adapted layers."
        )
        return _with_gamma(resolved, usual)
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
    return _with_gamma(resolved, best)


def _with_gamma(resolved: Resolved, gamma: float) -> Resolved:
    return resolved.changed(init_config=replace(resolved.config.init_config, stable_gamma=gamma))


@contextmanager
def _put_on(
    wrapped: PeftModel, name: str, resolved: Resolved, stats: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[None]:
    """Have the adapter on, alone and trained, for the length of a with-block."""
    tuner, model = wrapped.base_model, resolved.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(host, host.active_adapters, host.disable_adapters) for _, host in hosts(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the layers that fall back come with the start that is kept
        take_back = tuner.apply_plan(tuner.plan_adapter(resolved, name, stats=stats))
    try:
        tuner.set_adapter(name)
        tuner.enable_adapter_layers()
        yield
    finally:
        take_back()
        for host, names, off in before:
            host.activate(names)
            host.enable_adapters(not off)
        for parameter, flag in flags:
            parameter.requires_grad = flag  # by method, a lazy layer's parameter refuses


def _mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float:
    """The mean over the batches of all processes, in each of which it is the same number."""
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
