"""Alignment: the joint loss of a batch as a training loop calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.maps.base import RepresentationMap
from lorafa.alignment.objective import JointObjective, MapTerm, final_norm
from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS
from lorafa.alignment.teachers.base import Teacher
from lorafa.alignment.teachers.external import External
from lorafa.errors import BackendError, ConfigError
from lorafa.models.head_loss import supervised_loss, supervised_nll, supports_chunked_loss
from lorafa.models.modes import evaluating
from lorafa.models.positions import Positions
from lorafa.settings.checks import check_number


class Alignment:
    """Task and teacher together: J = CE + weight (divergence + map_weight map), a mean over supervised positions.

    Three lines of a loop of your own:

        alignment = Alignment(model, teacher="base")
        loss = alignment.loss(model, batch)      # in place of model(**batch).loss
        alignment.after_step(model)              # after optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: str | nn.Module | Teacher = "base",
        *,
        weight: float = 0.5,
        divergence: str | Divergence | None = None,
        map: str | RepresentationMap | None = None,
        map_layers: tuple[int, ...] | None = None,
        map_weight: float = 0.1,
    ) -> None:
        """Take in the student as it is at the start of training.

        Args:
            model: the student, a causal language model of transformers with adapters.
            teacher: "base", "snapshot", "ema", "anchor", or another model, which is frozen.
            weight: of the discrepancy beside the task's loss; 0 is a plain training.
            divergence: of the distributions over next tokens, by name or made with settings; by default
                "masked_target" for the base as the teacher, else "fkl".
            map: a distance of inner states beside it, by name or made with settings; None for none.
            map_layers: after which layers; by default after half of them and after the last.
            map_weight: its share beside the divergence.

        Raises:
            ConfigError: a name or number without meaning, a teacher of another vocabulary, or of other layers.
            AdapterError: the model has nothing that the teacher could be made of.
            BackendError: one of the models cannot be cut before its head.
        """
        check_number("weight", weight, "a number >= 0", 0.0, closed="[")
        check_number("map_weight", map_weight, "a number >= 0", 0.0, closed="[")
        self.teacher = _teacher(teacher)
        self.weight, self.task_weight = float(weight), 1.0
        self.divergence = _divergence(divergence, self.teacher)
        self.term = None if map is None else MapTerm(_map(map), map_layers or _half_and_last(model), float(map_weight))
        self.teacher.begin(model)
        self.last_divergence: float | None = None
        """The discrepancy of the last batch in the mean over its positions, without its weight; None where there was
        no teacher in it."""
        if self.weight:
            self._check(model)

    def _check(self, model: nn.Module) -> None:
        with self.teacher.running(model) as teaching:
            reasons = [(name, supports_chunked_loss(one)) for name, one in (("student", model), ("teacher", teaching))]
        for name, reason in reasons:
            if reason is not None:
                raise BackendError(f"The {name} cannot be cut before its head, which alignment needs: {reason}.")
        self.norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
        if self.term is not None and self.term.map.reads_lens:
            with self.teacher.running(model) as teaching:
                self.norms = final_norm(model), final_norm(teaching)
        if isinstance(self.teacher, External) and self.divergence is not None:
            sizes = [_vocabulary(one) for one in (model, self.teacher.model)]
            if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
                raise ConfigError(
                    f"The teacher has {sizes[1]:,} tokens and the student {sizes[0]:,}: their distributions over next "
                    "tokens cannot be compared. Take a teacher of the same vocabulary, or compare inner states alone: "
                    "divergence='none' and a map for any width (procrustes, gram)."
                )

    def loss(self, model: nn.Module, batch: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        """The joint loss of a batch, a differentiable float32 scalar; see :func:`supervised_loss` for the arguments.

        Raises:
            DivergedError: the teacher gives inf or nan.
            As :func:`lorafa.models.head_loss.supervised_loss`.
        """
        self.last_divergence = None
        if not self.weight and self.task_weight == 1.0:
            return supervised_loss(model, batch, num_items=num_items)
        said = self.said(model, batch)
        joint = JointObjective(said, self.divergence, self.term, self.weight, self.task_weight, self.norms)
        loss = supervised_loss(model, batch, num_items=num_items, objective=joint)
        self.last_divergence = joint.divergence_sum / max(len(said.rows), 1)
        return loss

    def said(self, model: nn.Module, batch: Mapping[str, Any]) -> Positions:
        """What the teacher's head reads at the supervised positions of a batch; without gradients and dropout."""
        kept = Positions(() if self.term is None else self.term.layers)
        with torch.no_grad(), evaluating(model), self.teacher.running(model) as teaching:
            supervised_nll(teaching, batch, objective=kept)
        return kept

    def after_step(self, model: nn.Module) -> None:
        """Let the teacher take in a step of the student's optimizer."""
        self.teacher.after_step(model)

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a training to go on."""
        return {"teacher": self.teacher.state_dict(), "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept."""
        self.teacher.load_state_dict(state["teacher"])
        self.weight = state["weight"]


def _teacher(given: str | nn.Module | Teacher) -> Teacher:
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return External(given)
    if given == External.name:
        raise ConfigError("teacher='external' names no model. Pass the model itself, loaded.")
    return TEACHERS.get(given)()


def _divergence(given: str | Divergence | None, teacher: Teacher) -> Divergence | None:
    if isinstance(given, Divergence):
        return given
    if given == "none":
        return None
    return DIVERGENCES.get(given or teacher.divergence)()


def _map(given: str | RepresentationMap) -> RepresentationMap:
    return given if isinstance(given, RepresentationMap) else MAPS.get(given)()


def _half_and_last(model: Any) -> tuple[int, ...]:
    """After ceil(L / 2) of the L layers, and after all."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = int(base.config.get_text_config().num_hidden_layers)
    return tuple(dict.fromkeys((-(-layers // 2), layers)))


def _vocabulary(model: Any) -> int:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return int(base.get_output_embeddings().weight.shape[0])
