"""Scalings of all adapters, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorafa.errors import AdapterError
from lorafa.settings.checks import check_number
from lorafa.surgery.activate import require_nothing_merged, without_start
from lorafa.surgery.walk import lora_layers


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every adapter by ``multiplier`` for the length of a with-block.

    Args:
        model: a PeftModel, or a model with injected adapters.

    Raises:
        ConfigError: ``multiplier`` is no finite number.
        AdapterError: the model has no adapters; or one is merged, or its start is taken out of the base: its scaling
            is in the weights then.
    """
    check_number("multiplier", multiplier, "a finite number", -float("inf"))
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise AdapterError(f"The {type(model).__name__} has no adapters to scale. Call get_peft_model first.")
    require_nothing_merged(model)
    if (changed := without_start(model)) is not None:
        raise AdapterError(
            f"The start of adapter {changed!r} is taken out of the base weights, for the scaling it has. Call "
            "restore_base(model) before it is scaled."
        )
    before = [(layer, {name: one.written_scaling for name, one in layer.adapters.items()}) for layer in layers]
    try:
        for layer, scalings in before:
            for name, scaling in scalings.items():
                layer.scaling[name] = scaling * multiplier
        yield
    finally:
        for layer, scalings in before:
            for name, scaling in scalings.items():
                if name in layer.scaling:
                    layer.scaling[name] = scaling
