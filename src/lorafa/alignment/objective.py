"""The joint loss of task and teacher at the supervised positions of a batch, without ever holding all logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.maps.base import Look, RepresentationMap, States
from lorafa.alignment.said import Said, look
from lorafa.errors import ConfigError, DivergedError
from lorafa.models.head_loss import LOG_LIKELIHOOD, HiddenStates, head_loss
from lorafa.models.positions import states_at, supervised
from lorafa.models.wrapped import inner_model

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm")
"""What models call the norm between their last layer and their head."""


@dataclass(frozen=True)
class MapTerm:
    """A distance of inner states that is a part of the discrepancy."""

    map: RepresentationMap
    layers: tuple[int, ...]
    """After which layers of the student, and of the teacher, states are compared."""
    weight: float
    """Its share beside the divergence."""
    projections: Mapping[int, nn.Linear] = field(default_factory=dict)
    """After each of the layers what is trained with the map, where something is."""


class JointObjective:
    """``task_weight`` CE + ``weight`` (divergence + map), summed over the supervised positions of one batch.

    It knows what the teacher has said of the batch, :class:`lorafa.alignment.said.Said`, and is made anew for each.
    ``divergence_sum`` is the sum of the discrepancy once it was called, without its weight.
    """

    def __init__(
        self,
        said: Said,
        divergence: Divergence | None,
        term: MapTerm | None,
        weight: float,
        task_weight: float = 1.0,
        norms: tuple[nn.Module | None, nn.Module | None] = (None, None),
    ) -> None:
        self.said, self.divergence, self.term = said, divergence, term
        self.weight, self.task_weight, self.norms = weight, task_weight, norms
        self.layers = () if term is None else term.layers
        self.divergence_sum = 0.0
        self.task_sum = 0.0

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        counted = supervised(targets)
        count = len(counted)
        if count != len(self.said):
            raise ConfigError(
                f"The teacher has read {len(self.said)} supervised positions, and the student {count} of the same "
                "batch: one of the two changes the labels."
            )
        points = _JointPoints(self.said, self.divergence, self.weight, self.task_weight)
        total, count = head_loss(states, targets, chunk_tokens, points)
        self.divergence_sum, self.task_sum = float(points.divergence), float(points.task)
        if self.term is not None and count:
            for layer in self.term.layers:
                distance = self._distance(self.term.map, states, counted, layer)
                share = self.term.weight / len(self.term.layers)
                total = total + self.weight * share * count * distance.to(total.device)
                self.divergence_sum += share * count * float(distance.detach())
        # a student whose own loss is not finite is the task's matter: trainers and gates look at that
        if not math.isfinite(self.divergence_sum) and math.isfinite(self.task_sum):
            raise DivergedError(
                "The divergence from the teacher is not finite. Look at the teacher's outputs for these rows: it gives "
                "inf or nan, or forbids tokens (a logit of -inf)."
            )
        return total, count

    def _distance(self, between: RepresentationMap, states: HiddenStates, counted: Tensor, layer: int) -> Tensor:
        own = states.inner[layer]
        hidden, theirs = states_at(own, counted), self.said.inner[layer].to(own.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        looks: tuple[Look | None, Look | None] = (None, None)
        if between.reads_lens:
            norm = None if layer == states.depth else self.norms[0]
            looks = look(states.head, states.transform, norm), self.said.look(layer, self.norms[1])
        projection = self.term.projections.get(layer) if self.term is not None else None
        return between(States(hidden.to(wide), looks[0], projection), States(theirs.to(wide), looks[1]))


class _JointPoints:
    """The joint loss of logits, position by position."""

    def __init__(self, said: Said, divergence: Divergence | None, weight: float, task_weight: float) -> None:
        self.said, self.of, self.weight, self.task_weight = said, divergence, weight, task_weight
        self.divergence: Tensor | float = 0.0
        self.task: Tensor | float = 0.0
        """Sums where the logits are: reading a number of each chunk would wait for the device."""

    def begin(self, start: int, end: int) -> None:
        if self.of is not None:
            self.said.begin(start, end)

    def __call__(self, logits: Tensor, gold: Tensor, first: int, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        task, grad = LOG_LIKELIHOOD(logits, gold, first, wants_gradient)
        self.task = self.task + task
        total = task if self.task_weight == 1.0 else task * self.task_weight
        if grad is not None and self.task_weight != 1.0:
            grad *= self.task_weight
        if self.of is None or not len(gold):
            return total, grad
        value, slope = self.said.compared(self.of, logits[: len(gold)], gold, first, wants_gradient)
        if slope is not None and grad is not None:
            grad[: len(gold), : slope.shape[-1]].add_(slope, alpha=self.weight)
        divergence = value.sum()
        self.divergence = self.divergence + divergence
        return total + self.weight * divergence, grad


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the head, which a logit lens reads through.

    Raises:
        ConfigError: no module of a known name is there.
    """
    base = inner_model(model)
    body = getattr(base, "base_model", base)
    for holder in (body, getattr(body, "decoder", None)):
        for name in _NORMS:
            norm = getattr(holder, name, None)
            if isinstance(norm, nn.Module):
                return norm
    raise ConfigError(
        f"The norm before the head of {type(base).__name__} is not known ({', '.join(_NORMS)}), so its inner states "
        "cannot be read through the head. Take another align.map: procrustes, gram, cos or mse."
    )
