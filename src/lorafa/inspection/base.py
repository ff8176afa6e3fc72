"""An adapter on its base model: whether it fits, how large it is beside the weights, and its intruder dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter
from lorafa.errors import BackendError, LoraError, shorten
from lorafa.inspection.measures import Measured, measured, of_values
from lorafa.inspection.updates import LayerUpdate, updates_in
from lorafa.io.adapter_files import StoredAdapter
from lorafa.io.base_prints import base_fingerprint
from lorafa.layers.base import LoraLayer
from lorafa.numerics.low_rank import matrix_values
from lorafa.peft_model import PeftModel
from lorafa.storage.fingerprint import compare_fingerprints
from lorafa.surgery.intruders import EPSILON, TOP_K, Intruder, intruders_of, matrices, numbered
from lorafa.surgery.replicate import planned_places, replication_of
from lorafa.surgery.walk import Place, places

T = TypeVar("T")
Each = Callable[[Iterable[T]], Iterable[T]]


@dataclass(frozen=True)
class Fit:
    """Whether an adapter and a base model belong together."""

    recorded: int
    """How many layers the file has a fingerprint of; 0 in files of other libraries."""
    different: list[str] = field(default_factory=list)
    """Layers with a fingerprint whose weights are others here."""
    missing: list[str] = field(default_factory=list)
    """Layers that the model does not have."""
    problem: str = ""
    """Why the adapter cannot be put on the model; empty where it can."""

    @property
    def fits(self) -> bool:
        return not (self.problem or self.different or self.missing)

    @property
    def words(self) -> str:
        """The same as a sentence."""
        if self.problem:
            return f"The adapter does not fit the base: {' '.join(self.problem.split())}"
        if self.missing:
            return f"The base lacks layers that the adapter was made for: {shorten(self.missing, 3)}."
        if self.different:
            return (
                f"{len(self.different)} of {self.recorded} layers have other weights in this base than in the one the "
                f"adapter was made for: {shorten(self.different, 3)}."
            )
        if not self.recorded:
            return "The adapter fits the layers of the base; its file does not say which weights it was made for."
        return f"The adapter fits: the base has the weights it was made for ({self.recorded} layers compared)."


@dataclass(frozen=True)
class OnWeight:
    """What the update of one layer is beside its weight."""

    weight_norm: float
    """||W||_F."""
    ratio: float
    """||D||_F / ||W||_F."""
    intruders: tuple[Intruder, ...] | None
    """None where they are not defined: the update is no one matrix."""
    largest: float | None = None
    """The largest singular value of W + D; None likewise."""


@dataclass(frozen=True)
class OnBase:
    """What an adapter is on its base model."""

    fit: Fit
    updates: dict[str, LayerUpdate] = field(default_factory=dict)
    """By name, as the model holds them."""
    measures: dict[str, Measured] = field(default_factory=dict)
    """Numbers of whole updates, where a formula makes more of s B A than that."""
    weights: dict[str, OnWeight] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Layer -> why nothing can be said of its weight."""


def fit_of(model: nn.Module, stored: StoredAdapter) -> Fit:
    """Compare the fingerprint of a file with a model that carries no adapter."""
    everything = _places(model, stored)
    there, brought = {place.name for place in everything}, _brought(stored)
    named = [name for name in stored.base if name not in brought and ".base_layer." not in name]
    known = [name for name in named if name in there]
    actual = base_fingerprint(model, known, everything=everything)
    different = compare_fingerprints({name: stored.base[name] for name in known}, actual)
    return Fit(len(named), different, [name for name in named if name not in there])


def _places(model: nn.Module, stored: StoredAdapter) -> list[Place]:
    """Every place of the model as it will be: an adapter may replicate layers."""
    try:
        return planned_places(model, replication_of(model, stored.config))
    except LoraError:  # loading it says so
        return list(places(model))


def _brought(stored: StoredAdapter) -> set[str]:
    """Tables that the file holds itself."""
    return {key.removesuffix(".base_layer.weight") for key in stored.tensors}


def on_base(model: Any, source: str, stored: StoredAdapter, each: Each[Any] = iter) -> tuple[OnBase, PeftModel | None]:
    """Put an adapter on a model and measure it there; nothing but the fit is told where it does not go on.

    Args:
        model: the base, changed in place.
        source: folder or Hub id of the adapter.
        stored: what was read of it.
        each: goes through the layers and shows how far it is.

    Returns:
        What was found, and the model with the adapter; None where it does not fit.
    """
    fit = fit_of(model, stored)
    try:
        adapted = PeftModel.from_pretrained(model, source, ignore_base_mismatch=True)
    except LoraError as error:
        return OnBase(Fit(fit.recorded, fit.different, fit.missing, str(error))), None
    found = OnBase(fit)
    for update, layer in each(updates_in(adapted.get_base_model(), "default")):
        found.updates[update.name] = update
        try:
            found.measures[update.name], found.weights[update.name] = _on_weight(update, layer)
        except BackendError as error:
            found.measures[update.name] = measured(update)
            found.unreadable[update.name] = str(error)
    return found, adapted


@torch.no_grad()
def _on_weight(update: LayerUpdate, layer: LoraLayer) -> tuple[Measured, OnWeight]:
    """The whole update of a layer, and what it does to the weight.

    Raises:
        BackendError: no back end is sure of the weight, it has none for the update, or a value is not finite.
    """
    odd = layer.backend.reads(layer.pristine)
    if odd is not None:
        raise BackendError(f"no back end is sure of its weight: {odd}.")
    weight, adapter = layer.base_weight(), layer.adapters["default"]
    found = measured(update) if update.complete else of_values(_whole_values(adapter, weight))
    norm = float(torch.linalg.vector_norm(weight.float()))
    intruders: tuple[Intruder, ...] | None = None
    largest: float | None = None
    if adapter.variant.one_product:
        gain = adapter.variant.row_gain(adapter, weight)
        try:
            parts = [
                intruders_of(W, A, update.scaling * B, TOP_K, EPSILON, gain)
                for W, A, B in zip(matrices(weight), matrices(update.A), matrices(update.B), strict=True)
            ]
        except ValueError as error:
            raise BackendError("its weight or the update holds inf or nan, so it has no directions.") from error
        intruders = numbered([some for _, some in parts], stacked=weight.dim() == 3)
        largest = max(float(top.S[0]) if len(top.S) else 0.0 for top, _ in parts)
    return found, OnWeight(norm, found.frobenius / norm if norm else 0.0, intruders, largest)


def _whole_values(adapter: Adapter, weight: Tensor) -> Tensor:
    """Singular values of the update as a dense matrix; of a gate those where it is open."""
    inside = next(one for one in adapter.variant.chain() if one.uniform)
    return matrix_values(inside.delta_weight(adapter, weight.to(torch.promote_types(weight.dtype, torch.float32))))
