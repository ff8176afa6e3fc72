"""An adapter looked into: by its file alone, and with what is given beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafa.config import LoraConfig
from lorafa.errors import DataError, NotAvailableError
from lorafa.inspection.measures import Likeness, Measured, cosine_of, likeness, measured, shares
from lorafa.inspection.updates import LayerUpdate, beside, updates_of
from lorafa.io.adapter_files import StoredAdapter, read_adapter
from lorafa.io.layouts import of_others
from lorafa.io.layouts.names import BaseNames

if TYPE_CHECKING:
    from lorafa.inspection.base import Each, OnBase
    from lorafa.inspection.effect import Effect
    from lorafa.peft_model import PeftModel


@dataclass(frozen=True)
class Layer:
    """Everything that was found of the update of one layer."""

    update: LayerUpdate
    measured: Measured
    share: float
    """Its share of the energy of all layers, ||D||_F^2."""


@dataclass(frozen=True)
class Comparison:
    """Two adapters beside each other."""

    name: str
    """What the other one was asked for by."""
    layers: dict[str, Likeness]
    """Layers that both have."""
    only_here: list[str]
    only_there: list[str]
    cosine: float | None
    """The cosine between the updates of all common layers, each side as one vector."""


@dataclass(frozen=True)
class Inspection:
    """What an adapter is."""

    name: str
    """What it was asked for by."""
    path: Path
    """Its file of tensors."""
    bytes: int
    """The size of that file."""
    dtypes: list[str]
    """The number formats of its tensors."""
    config: LoraConfig
    layers: list[Layer]
    beside: dict[str, int]
    """What else the file holds: key -> how many numbers."""
    base_name: str | None = None
    """The base model that was loaded."""
    base: OnBase | None = None
    effect: Effect | None = None
    other: Comparison | None = None
    notes: list[str] = field(default_factory=list)
    """What has to be known to read the numbers."""

    @property
    def numbers(self) -> int:
        """How many numbers the dense factors have."""
        return sum(layer.update.numbers for layer in self.layers)

    @property
    def frobenius(self) -> float:
        """||D||_F of all layers together."""
        return math.sqrt(math.fsum(layer.measured.energy for layer in self.layers))

    @property
    def intruders(self) -> int | None:
        """How many there are in all layers; None where none was looked for, or they are not defined."""
        weights = {} if self.base is None else self.base.weights
        counted = [len(one.intruders) for one in weights.values() if one.intruders is not None]
        return sum(counted) if counted else None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, layer by layer."""
        base, other = self.base, self.other
        found: dict[str, Any] = {
            "adapter": self.name,
            "file": str(self.path),
            "bytes": self.bytes,
            "dtypes": self.dtypes,
            "base_model": self.config.base_model_name_or_path,
            "config": self.config.to_dict(),
            "numbers": self.numbers,
            "frobenius": self.frobenius,
            "beside": self.beside,
            "layers": [self._layer(layer) for layer in self.layers],
            "notes": self.notes,
        }
        if base is not None:
            fit = base.fit
            found["base"] = {
                "model": self.base_name, "fits": fit.fits, "words": fit.words, "recorded": fit.recorded,
                "different": fit.different, "missing": fit.missing, "problem": fit.problem or None,
                "intruders": self.intruders,
                "effect": None if self.effect is None else asdict(self.effect),
            }  # fmt: skip
        if other is not None:
            found["other"] = {
                "adapter": other.name, "cosine": other.cosine, "only_here": other.only_here,
                "only_there": other.only_there,
            }  # fmt: skip
        return found

    def _layer(self, layer: Layer) -> dict[str, Any]:
        update, numbers = layer.update, layer.measured
        found: dict[str, Any] = {
            "name": update.name, "formula": update.formula, "rank": update.rank, "alpha": update.alpha,
            "scaling": update.scaling, "shape": list(update.shape), "frobenius": numbers.frobenius,
            "spectral": numbers.spectral, "effective_rank": numbers.effective_rank,
            "stable_rank": numbers.stable_rank, "share": layer.share, "singular_values": numbers.values,
        }  # fmt: skip
        if self.base is not None and update.name in self.base.weights:
            on = self.base.weights[update.name]
            found |= {"weight_frobenius": on.weight_norm, "ratio": on.ratio}
            found["intruders"] = None if on.intruders is None else [asdict(one) for one in on.intruders]
        if self.other is not None and update.name in self.other.layers:
            found["likeness"] = asdict(self.other.layers[update.name])
        return found


Load = Callable[[], tuple[Any, Any]]
"""Gives a base model and its tokenizer; None in place of that where the outputs of the base mean nothing."""


def inspect(
    source: str,
    *,
    name: str | None = None,
    base: Load | None = None,
    base_name: str | None = None,
    other: str | None = None,
    other_name: str | None = None,
    text: str | None = None,
    each: Each[Any] = iter,
) -> Inspection:
    """Look into an adapter.

    Args:
        source: folder or Hub id of the adapter.
        name: what to call it; None: as ``source``.
        base: loads the base model to measure it on; None: the file alone is looked at.
        base_name: what to call that.
        other: folder or Hub id of an adapter to compare it with.
        other_name: what to call that.
        text: what the effect on the logits is measured on; None: ``lorafa.inspection.effect.TEXT``.
        each: goes through the layers and shows how far it is.

    Raises:
        SourceError: a file is not there.
        CheckpointError: it is damaged, or the two adapters are of different base models.
    """
    load = None if base is None else cache(base)
    stored = _read(source, load)
    updates = updates_of(stored)
    compared = None if other is None else _compared(updates, updates_of(_read(other, load)), other_name or other)
    found: OnBase | None = None
    effect: Effect | None = None
    unmeasured: list[str] = []
    if load is not None:
        from lorafa.inspection.base import on_base  # what runs models, which a file does without

        model, tokenizer = load()
        found, adapted = on_base(model, source, stored, each)
        effect, unmeasured = _effect(adapted, tokenizer, text)
    measures = found.measures if found is not None and found.measures else {}
    if measures and found is not None:  # the model knows the names of parameters, and every whole update
        updates = list(found.updates.values())
    numbers = [measures.get(update.name) or measured(update) for update in updates]
    layers = [Layer(*of_layer) for of_layer in zip(updates, numbers, shares(numbers), strict=True)]
    notes = [*_notes(stored, updates, whole=bool(measures), compared=compared), *unmeasured]
    return Inspection(
        name or source, stored.path, stored.path.stat().st_size, _dtypes(stored), stored.config, layers,
        beside(stored), base_name, found, effect, compared, notes,
    )  # fmt: skip


def _read(source: str, load: Load | None) -> StoredAdapter:
    """The adapter by its file; with a base at hand one in the layout of another program, too."""
    names = None if load is None else lambda: BaseNames(load()[0])
    return read_adapter(source, convert=partial(of_others, names=names))


def _effect(adapted: PeftModel | None, tokenizer: Any, text: str | None) -> tuple[Effect | None, list[str]]:
    """What the adapter does to the logits; where that cannot be measured None, and why."""
    from lorafa.inspection.effect import TEXT, effect_of  # what runs models, which a file does without

    if tokenizer is None:
        return None, [
            "The effect on the outputs was not measured: those of the base itself are made by a new, random head."
        ]
    if adapted is None:
        return None, []
    try:
        return effect_of(adapted, tokenizer, TEXT if text is None else text), []
    except (NotAvailableError, DataError) as error:
        return None, [str(error)]


def _compared(here: Sequence[LayerUpdate], there: Sequence[LayerUpdate], name: str) -> Comparison:
    others = {update.name: update for update in there}
    both = [(update, others[update.name]) for update in here if update.name in others]
    names = {update.name for update in here}
    return Comparison(
        name,
        {one.name: likeness(one, other) for one, other in both},
        [update.name for update in here if update.name not in others],
        [update.name for update in there if update.name not in names],
        cosine_of(both),
    )


def _dtypes(stored: StoredAdapter) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()})


def _notes(
    stored: StoredAdapter, updates: Sequence[LayerUpdate], *, whole: bool, compared: Comparison | None
) -> list[str]:
    notes = []
    formulas = sorted({update.formula for update in updates if not update.complete})
    if formulas and not whole:
        notes.append(
            f"The update of {', '.join(formulas)} depends on the base weights. The numbers are those of s B A, which "
            "it is made of; with --base they are those of the whole update."
        )
    routed = sorted({update.formula for update in updates if not update.everywhere})
    if routed:
        notes.append(
            f"{', '.join(routed)} adds its update to some tokens, or parts of it to each: the numbers are those of all "
            "of it, where it counts."
        )
    if formulas and compared is not None:
        notes.append(f"Similarity is that of s B A, of which {', '.join(formulas)} makes the update.")
    if stored.quantized:
        notes.append(
            "The start has quantized the base: weights and outputs are compared with those of the quantized one."
        )
    if stored.with_start:
        notes.append(
            "The start was taken out of the base, so the update is s (B A - B0 A0), of twice the rank: it was zero at "
            "the first step."
        )
    return notes
