"""The teacher of a run, from its settings to an Alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lorafa.alignment.alignment import Alignment
from lorafa.alignment.registries import DIVERGENCES, TEACHERS
from lorafa.alignment.schedule import CyclicSettings, Decision
from lorafa.backends.offload import device_of
from lorafa.errors import ConfigError, DataError
from lorafa.models.load import load_model
from lorafa.models.quantize import quantize_linears
from lorafa.train.keeping import Recorder
from lorafa.train.settings.align import CYCLIC_FIELDS, EXTERNAL, AlignConfig

Teach = Callable[[int], Alignment]
"""Optimizer steps of the whole training -> the alignment of its model."""


def teacher_of(
    align: AlignConfig,
    model: Any,
    tokenizer: Any,
    heldout: Sequence[Any],
    collate: Callable[[Any], dict[str, Any]],
    batch_size: int,
) -> Teach | None:
    """How the alignment of a training is made; None where it has no teacher that counts.

    Args:
        heldout: rows that are not trained on, of which the first are the probe of a cyclic schedule.
        collate: makes a batch of rows.
        batch_size: rows of a batch of the probe.

    Raises:
        ConfigError: the teacher has another vocabulary.
        DataError: a cyclic schedule has no rows to measure on.
        SourceError: the teacher cannot be found or loaded.
    """
    if not align.teaches:
        return None
    probe = _probe(align, heldout, collate, batch_size, device_of(model))
    teacher = _teacher(align, model, tokenizer)
    own = {} if align.own_of_divergence is None else asdict(align.own_of_divergence)
    named = align.divergence
    divergence = named if named in (None, "none") else DIVERGENCES.get(named)(**own)
    cyclic = {name: getattr(align, name) for name in CYCLIC_FIELDS if name != "probe_rows"}

    def make(steps: int) -> Alignment:
        return Alignment(
            model, teacher, weight=align.weight, divergence=divergence, map=align.map,
            map_layers=None if align.map_layers is None else tuple(align.map_layers), map_weight=align.map_weight,
            schedule="constant" if align.schedule == "constant" else CyclicSettings(**cyclic), steps=steps, probe=probe,
        )  # fmt: skip

    return make


def _teacher(align: AlignConfig, model: Any, tokenizer: Any) -> Any:
    if align.name != EXTERNAL:
        return TEACHERS.get(align.name)(**({} if align.own is None else asdict(align.own)))
    teacher, its = load_model(str(align.teacher), align.dtype)
    if its.get_vocab() != tokenizer.get_vocab() and align.divergence != "none":
        raise ConfigError(
            f"align.teacher={align.teacher} has another vocabulary than the model, so their distributions over next "
            "tokens cannot be compared. Take a teacher of the same family."
        )
    if align.quantize is not None:
        quantize_linears(teacher, align.quantize, setting="align.quantize")
    return teacher.to(device_of(model))


def _probe(
    align: AlignConfig, heldout: Sequence[Any], collate: Any, batch_size: int, device: Any
) -> list[dict[str, Any]]:
    if align.schedule == "constant":
        return []
    rows = list(heldout[: align.probe_rows])
    if not rows:
        raise DataError(
            "align.schedule=cyclic measures the student on held-out rows, and none are held out. Set data.eval_size."
        )
    batches = [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


class Decisions:
    """Writes what the schedule of a teacher decides into the record of a run, one entry after another."""

    def __init__(self, run: Recorder, step: int) -> None:
        """Go on after so many steps; what stands there of later ones is dropped."""
        self.run = run
        known = run.result().get("decisions", ())
        self.rows: list[dict[str, Any]] = [row for row in known if row["step"] <= step]

    def __call__(self, decision: Decision) -> None:
        probe = {} if decision.probe is None else asdict(decision.probe)
        row = {"step": decision.step, "kind": decision.kind, "phase": decision.phase, "why": decision.why}
        self.rows.append(row | probe | ({"discarded": decision.discarded} if decision.discarded else {}))
        self.run.update_result(decisions=self.rows)
