"""Proof of an export: what was written is read back by its reader's rules, and compared."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from lorafa.errors import CheckpointError
from lorafa.export.base import BaseFacts
from lorafa.export.entry import Exporter
from lorafa.export.peft import PEFT
from lorafa.export.update import PlainAdapter, relative_error
from lorafa.peft_model import PeftModel
from lorafa.surgery.verify import made_inputs, outputs_of

TOLERANCE = 1e-5
"""The largest relative difference, ||one - other||_F / ||one||_F, of updates that are called the same: more than
rounding B to float32 once makes, and far less than a wrong scaling."""


@dataclass(frozen=True)
class Proof:
    """How far what is read back is from what was exported."""

    layers: int
    error: float
    """The largest relative difference of the update of a layer."""
    logits: tuple[float, float] | None = None
    """(largest difference of the logits from those of the adapter, largest change that the adapter makes), where there
    is a base."""

    def in_words(self) -> str:
        text = f"Read back: {self.layers} updates, the largest relative difference {self.error:.1e}"
        if self.logits is None:
            return f"{text}."
        difference, effect = self.logits
        return (
            f"{text}; logits on the base differ by {difference:.1e} at most from those of the adapter, which changes "
            f"them by up to {effect:.1e}."
        )


def prove(
    exporter: Exporter, adapter: PlainAdapter, folder: Path, base: BaseFacts | None, model: PeftModel | None
) -> Proof:
    """Read what was written and compare each update with that of the adapter; with a model their logits, too.

    Args:
        model: the base with the adapter on it, before any other rank was given.

    Raises:
        CheckpointError: an update is another one.
    """
    read = exporter.read(folder, adapter, base)
    errors = {a.path: relative_error(a, b) for a, b in zip(adapter.updates, read, strict=True)}
    worst = max(errors, key=lambda path: errors[path])
    if not errors[worst] <= TOLERANCE:
        raise CheckpointError(
            f"What was written for {exporter.words} is not the adapter: read back, the update of {worst!r} differs by "
            f"{errors[worst]:.2e} of its size. This is a fault of lorafa; please report it. Nothing was written."
        )
    logits = None if model is None else compared_logits(model, replace(adapter, updates=tuple(read)))
    return Proof(len(errors), errors[worst], logits)


def compared_logits(model: PeftModel, read: PlainAdapter) -> tuple[float, float]:
    """(largest difference of the logits, largest change of the adapter) on random tokens, each in the model's dtype.

    Args:
        model: the base with the adapter; another is loaded beside it for the length of the call.
    """
    inputs = made_inputs(model.get_base_model())
    with tempfile.TemporaryDirectory() as place:
        PEFT.write(read, Path(place), None)
        wanted = outputs_of(model, inputs)
        name = "read back"
        before = model.base_model.active_adapters
        model.load_adapter(place, name)
        try:
            model.base_model.set_adapter(name, inference_mode=True)
            found = outputs_of(model, inputs)
        finally:
            model.base_model.set_adapter(before, inference_mode=True)
            model.delete_adapter(name)
    with model.disable_adapter():
        without = outputs_of(model, inputs)
    return float((found - wanted).abs().max()), float((wanted - without).abs().max())
