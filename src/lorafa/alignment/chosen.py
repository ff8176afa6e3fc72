"""The parts of an alignment by their names, or as they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.maps.base import RepresentationMap
from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS
from lorafa.alignment.schedule import SCHEDULES, Constant, Cyclic, CyclicSettings, Schedule
from lorafa.alignment.teachers.base import Teacher
from lorafa.alignment.teachers.external import External
from lorafa.errors import BackendError, ConfigError
from lorafa.models.wrapped import inner_model
from lorafa.settings.checks import check_choice, check_int, found, indices


def chosen_schedule(
    given: str | CyclicSettings, weight: float, steps: int | None, probe: Sequence[Mapping[str, Any]]
) -> Schedule:
    """The schedule, one for each step where the teacher has no weight.

    Raises:
        ConfigError: there is none of this name, or a cyclic one lacks the steps or the probe, or has no room for the
            teacher in them.
    """
    if given == "constant" or not weight:
        return Constant(weight)
    if not isinstance(given, CyclicSettings):
        check_choice("schedule", given, SCHEDULES)
        given = CyclicSettings()
    if steps is None or not probe:
        raise ConfigError(
            "A cyclic schedule measures the student on fixed rows and has to know where the training ends. Pass probe, "
            "batches with labels, and steps."
        )
    check_int("steps", steps, at_least=1)
    require_room(given, steps)
    return Cyclic(given, steps)


def chosen_probe(given: Any) -> list[Mapping[str, Any]]:
    """The batches of a probe.

    Raises:
        ConfigError: they are no mappings, or it is a batch itself.
    """
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else [given]
    if isinstance(given, Mapping) or not all(isinstance(batch, Mapping) for batch in listed):
        raise ConfigError(
            f"probe is a list of batches, each a mapping with labels, found {type(given).__name__}. Pass [batch]."
        )
    return listed


def require_room(settings: CyclicSettings, steps: int) -> None:
    """Raises ConfigError where a training of so many steps has no phase of the teacher."""
    first = settings.task_steps if settings.trigger == "clock" else -(-settings.task_steps // 4)
    needed = 1 + settings.teacher_steps
    if not settings.end_on_teacher:
        needed = first + 2 * settings.teacher_steps
    if steps < needed:
        raise ConfigError(
            f"The training has {steps} steps, and with align.task_steps={settings.task_steps} and "
            f"align.teacher_steps={settings.teacher_steps} a phase of the teacher needs {needed}: the teacher would "
            "count in none. Lower both, train for longer, or take align.schedule=constant."
        )


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
    return DIVERGENCES.get(teacher.divergence if given is None else given)()


def chosen_map(given: str | RepresentationMap) -> RepresentationMap:
    """The distance of inner states.

    Raises:
        ConfigError: there is none of this name.
    """
    return given if isinstance(given, RepresentationMap) else MAPS.get(given)()


def chosen_layers(given: Sequence[int] | None, model: Any) -> tuple[int, ...]:
    """After which layers states are compared: by default ceil(L / 2) of the L layers, and all.

    Raises:
        ConfigError: they are no numbers of the model's layers, or none.
        BackendError: the model does not say how many layers it has.
    """
    count = _depth(model)
    if given is None:
        return tuple(dict.fromkeys((-(-count // 2), count)))
    listed = indices("align.map_layers", given)
    if not listed or max(listed) > count:
        raise ConfigError(
            f"align.map_layers={found(listed)} names {'no layer' if not listed else f'layer {max(listed)}'}, and the "
            f"model has {count}. Name some from 0, the embedding, to {count}."
        )
    return tuple(listed)


def require_depth(layers: Sequence[int], model: Any, teacher: Any, *, named: bool) -> None:
    """Raises ConfigError where layers that are compared are no counterparts, or the teacher has none of the number."""
    own, theirs = _depth(model), _depth(teacher)
    if max(layers) > theirs or (own != theirs and not named):
        raise ConfigError(
            f"The teacher has {theirs} layers and the student {own}, and states are compared after the same number of "
            f"layers in both. Name align.map_layers, from 0, the embedding, to {min(own, theirs)}."
        )


def _depth(model: Any) -> int:
    """The layers of a model.

    Raises:
        BackendError: it does not say how many.
    """
    base = inner_model(model)
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "get_text_config"):
        raise BackendError(
            f"align.map reads inner states of models of transformers, and this is {type(base).__name__}. Drop it."
        )
    return int(config.get_text_config().num_hidden_layers)
