"""The teacher of a run, from its settings to an Alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lorafa.alignment.alignment import Alignment
from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.registries import DIVERGENCES, TEACHERS
from lorafa.alignment.schedule import Decision
from lorafa.alignment.teachers.external import External
from lorafa.alignment.teachers.model_base import Base
from lorafa.backends.offload import device_of
from lorafa.data.packing import as_read
from lorafa.errors import ConfigError, DataError
from lorafa.models.load import load_model, load_tokenizer
from lorafa.models.quantize import quantize_linears
from lorafa.starts.joint import JointStart
from lorafa.train.keeping import Recorder
from lorafa.train.settings.align import EXTERNAL, AlignConfig
from lorafa.train.targets import Batches, with_targets

Teach = Callable[[int], Alignment]
"""Optimizer steps of the whole training -> the alignment of its model."""


def teacher_of(
    align: AlignConfig,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    heldout: Sequence[Any],
    collate: Callable[[Any], dict[str, Any]],
    batch_size: int,
    loaded: Any = None,
) -> Teach | None:
    """How the alignment of a training is made; None where it has no teacher that counts.

    Args:
        rows: what is trained on, of which a teacher that is kept is asked.
        heldout: rows that are not trained on, of which the first are the probe of a cyclic schedule.
        collate: makes a batch of rows.
        batch_size: rows of a batch of the probe, and of one that a teacher is asked.
        loaded: the teacher, where the start has read it already.

    Raises:
        ConfigError: the teacher has another vocabulary.
        DataError: a cyclic schedule has no rows to measure on.
        SourceError: the teacher cannot be found or loaded.
    """
    if not align.teaches:
        return None
    probe = _probe(align, heldout, collate, batch_size, device_of(model))
    divergence = _divergence(align)
    schedule = "constant" if align.schedule == "constant" else align.phases()

    def load() -> Any:
        return _loaded(align, model, tokenizer) if loaded is None else loaded

    def made(teacher: Any, steps: int) -> Alignment:
        return Alignment(
            model, teacher, weight=align.weight, divergence=divergence, map=align.map,
            map_layers=None if align.map_layers is None else tuple(align.map_layers), map_weight=align.map_weight,
            schedule=schedule, steps=steps, probe=probe,
        )  # fmt: skip

    if align.cache:
        if align.name == EXTERNAL:
            its = load_tokenizer(str(align.teacher), trust_remote_code=align.trust_remote_code)
            _require_vocabulary(align, its, tokenizer)
        batches = Batches(rows, lambda some: as_read(collate(some)), batch_size, probe)
        own_divergence = divergence if isinstance(divergence, Divergence) else DIVERGENCES.get(_usual(align))()
        return lambda steps: with_targets(
            align, model, own_divergence, load, batches, lambda teacher: made(teacher, steps)
        )  # fmt: skip
    teacher = load() if align.name == EXTERNAL else TEACHERS.get(align.name)(**_own(align))
    return lambda steps: made(teacher, steps)


def _own(align: AlignConfig) -> dict[str, Any]:
    return {} if align.own is None else asdict(align.own)


def _usual(align: AlignConfig) -> str:
    """The divergence where none is named."""
    return External.divergence if align.name == EXTERNAL else Base.divergence


def _loaded(align: AlignConfig, model: Any, tokenizer: Any) -> Any:
    teacher, its = load_model(str(align.teacher), align.dtype, trust_remote_code=align.trust_remote_code)
    _require_vocabulary(align, its, tokenizer)
    if align.quantize is not None:
        quantize_linears(teacher, align.quantize, setting="align.quantize")
    return teacher.to(device_of(model))


def _require_vocabulary(align: AlignConfig, its: Any, tokenizer: Any) -> None:
    own, theirs = tokenizer.get_vocab(), its.get_vocab()
    if align.divergence == "none":
        if own.items() <= theirs.items():
            return
        raise ConfigError(
            f"align.teacher={align.teacher} reads the same token ids as the model, and in its vocabulary "
            f"{len(own.items() - theirs.items()):,} of {len(own):,} of them are other tokens: it would read other "
            "texts. Take a teacher of the same family."
        )
    if own != theirs:
        raise ConfigError(
            f"align.teacher={align.teacher} has another vocabulary than the model, so their distributions over next "
            "tokens cannot be compared. Take a teacher of the same family, or, where it has more tokens only, compare "
            "inner states alone: align.divergence=none align.map=procrustes."
        )


def _divergence(align: AlignConfig) -> Any:
    own = {} if align.own_of_divergence is None else asdict(align.own_of_divergence)
    named = align.divergence
    return named if named in (None, "none") else DIVERGENCES.get(named)(**own)


def joint_start(align: AlignConfig, model: Any, tokenizer: Any) -> JointStart | None:
    """The teacher of a run as that of its start; None where the start is left to the task.

    Raises:
        ConfigError: the teacher has another vocabulary.
        SourceError: the teacher cannot be found or loaded.
    """
    if not (align.teaches and align.start):
        return None
    return JointStart(
        teacher=_loaded(align, model, tokenizer) if align.name == EXTERNAL else align.name,
        divergence=_divergence(align), map=align.map,
        map_layers=None if align.map_layers is None else tuple(align.map_layers), map_weight=align.map_weight,
        weight=align.start_weight,
    )  # fmt: skip


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
