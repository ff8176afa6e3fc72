"""The parts of an alignment by their names, or as they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.maps.base import RepresentationMap
from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS
from lorafa.alignment.schedule import SCHEDULES, Constant, Cyclic, CyclicSettings, Schedule
from lorafa.alignment.teachers.base import Teacher
from lorafa.alignment.teachers.external import External
from lorafa.errors import ConfigError
from lorafa.models.wrapped import inner_model
from lorafa.settings.checks import check_choice


def chosen_schedule(
    given: str | CyclicSettings, weight: float, steps: int | None, probe: Sequence[Mapping[str, Any]]
) -> Schedule:
    """The schedule, one for each step where the teacher has no weight.

    Raises:
        ConfigError: there is none of this name, or a cyclic one lacks the steps or the probe.
    """
    if given == "constant" or not weight:
        return Constant(weight)
    if isinstance(given, str):
        check_choice("schedule", given, SCHEDULES)
        given = CyclicSettings()
    if steps is None or not probe:
        raise ConfigError(
            "A cyclic schedule measures the student on fixed rows and has to know where the training ends. Pass probe, "
            "batches with labels, and steps."
        )
    return Cyclic(given, steps)


def chosen_teacher(given: str | nn.Module | Teacher) -> Teacher:
    """The teacher: one of the table, one that was made, or a model.

    Raises:
        ConfigError: there is none of this name.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return External(given)
    if given == External.name:
        raise ConfigError("teacher='external' names no model. Pass the model itself, loaded.")
    return TEACHERS.get(given)()


def chosen_divergence(given: str | Divergence | None, teacher: Teacher) -> Divergence | None:
    """The divergence, by default the teacher's own; None for "none".

    Raises:
        ConfigError: there is none of this name.
    """
    if isinstance(given, Divergence):
        return given
    if given == "none":
        return None
    return DIVERGENCES.get(given or teacher.divergence)()


def chosen_map(given: str | RepresentationMap) -> RepresentationMap:
    """The distance of inner states.

    Raises:
        ConfigError: there is none of this name.
    """
    return given if isinstance(given, RepresentationMap) else MAPS.get(given)()


def half_and_last(model: Any) -> tuple[int, ...]:
    """After ceil(L / 2) of the L layers, and after all."""
    layers = int(inner_model(model).config.get_text_config().num_hidden_layers)
    return tuple(dict.fromkeys((-(-layers // 2), layers)))
