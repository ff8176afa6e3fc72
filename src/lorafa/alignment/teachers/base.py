"""What every teacher answers to, and the frame of those that are states of the student's own adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.errors import AdapterError, CheckpointError, ConfigError
from lorafa.surgery.walk import hosts, lora_layers, uncompiled_name

if TYPE_CHECKING:
    from lorafa.alignment.said import Told


@dataclass(frozen=True)
class Refreshed:
    """What has become of a teacher that was told to follow the student."""

    discarded: float = 0.0
    """The share of the squared norm of its update that its rank could not hold."""


class Teacher(ABC):
    """A function of the same inputs, frozen between refreshes, that the student is held close to."""

    name: ClassVar[str]
    starts_as_student: ClassVar[bool] = True
    """Whether it is the student's function at the start, so that their divergence is 0 there, and its gradient."""
    divergence: ClassVar[str] = "fkl"
    """The one that is taken unless another is asked for."""
    follows: ClassVar[bool] = False
    """Whether it changes when it is refreshed."""
    each_step: ClassVar[bool] = False
    """Whether it changes with each step of the student."""
    copies: ClassVar[int] = 0
    """How many states of all that is trained it keeps at most."""

    discarded: float = 0.0
    """The share of the squared norm of the updates that the last step could not hold, where it changes with each."""

    @property
    def runs(self) -> bool:
        """Whether there is a model that can be run, and not only what was kept of one."""
        return True

    def begin(self, model: nn.Module) -> None:
        """Take in what the student is at the start of training.

        Raises:
            AdapterError: the student has no adapters this teacher could be made of.
        """
        return None

    def settle(self, model: nn.Module, divergence: Divergence | None, reads_states: bool) -> None:
        """Take in how it will be compared with the student.

        Args:
            reads_states: whether inner states are compared.

        Raises:
            ConfigError: this teacher cannot be compared so.
        """
        return None

    def vocabulary(self) -> int | None:
        """How many tokens it tells apart; None: as many as the student."""
        return None

    def fingerprint(self, model: nn.Module) -> str:
        """Tells it from other teachers, by all its weights.

        Raises:
            ConfigError: it changes while the student is trained.
        """
        raise ConfigError(
            f"A cache keeps what a teacher says of a row once and for all, and {self.name!r} changes while the student "
            "is trained. Take the base or an external model, or no cache (align.cache=false)."
        )

    def told(self, model: nn.Module, batch: Mapping[str, Any]) -> Told | None:
        """What was kept of it for these rows; None for a teacher that is to run."""
        return None

    @abstractmethod
    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        """The teacher, for the length of a with-block in which no gradient is taken.

        Args:
            model: the student, of which adapters may be exchanged or switched off inside the block.
        """

    def after_step(self, model: nn.Module) -> None:
        """Take in a step of the student's optimizer, where the teacher changes with each."""
        return None

    def refresh(self, model: nn.Module) -> Refreshed:
        """Follow the student."""
        return Refreshed()

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a training to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept.

        Raises:
            CheckpointError: it is of another teacher or another adapter.
        """
        if state:
            raise CheckpointError(f"A teacher {self.name!r} keeps nothing, and the checkpoint has {', '.join(state)}.")


class OfTheAdapters(Teacher):
    """A teacher that is the student's base with other values of what is trained."""

    follows = True
    copies = 1

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        parameters = trained(model)
        if not parameters or not any(True for _ in lora_layers(model)):
            raise AdapterError(
                f"align={self.name} keeps another state of the student's adapters, and this model trains none. Put an "
                "adapter on it, or take another teacher."
            )
        self.values = copied(model)

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        self.require_same(model)
        _require_counting(model, self.name)
        with exchanged(trained(model), self.values):
            yield model

    def require_same(self, model: nn.Module) -> None:
        """Raises AdapterError where other parameters are trained than the teacher has values of."""
        require_trained_as(model, self.values, f"the teacher {self.name!r} was made")

    def state_dict(self) -> dict[str, Any]:
        return {"values": {name: value.clone() for name, value in self.values.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = state.get("values", {})
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if shapes != {name: tuple(value.shape) for name, value in self.values.items()}:
            raise CheckpointError(
                f"The checkpoint's teacher {self.name!r} has values of other parameters than are trained here."
            )
        self.values = {name: value.to(self.values[name]) for name, value in values.items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, by the names it has where nothing is compiled."""
    return {uncompiled_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that is trained, by name."""
    with torch.no_grad():
        return {name: p.detach().clone() for name, p in trained(model).items()}


@contextmanager
def exchanged(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters have the values of these names inside the block."""
    own = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


def require_trained_as(model: nn.Module, values: Mapping[str, Tensor], since: str) -> None:
    """Raises AdapterError unless what is trained has the names and shapes of these values, kept when ``since``."""
    own, kept = ({name: tuple(one.shape) for name, one in each.items()} for each in (trained(model), values))
    if own != kept:
        name = min(name for name in own.keys() | kept.keys() if own.get(name) != kept.get(name))
        raise AdapterError(
            f"What is trained has changed since {since}: {name}. Begin the alignment after adapters are chosen."
        )


def require_state(state: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError unless this is the state of an alignment with the teacher of that name."""
    absent = {"name", "teacher", "schedule", "kept", "weighing", "map", "carry", "steps", "teacher_passes"} - set(state)
    if absent:
        raise CheckpointError(f"The state of an alignment has no {min(absent)!r}: it is damaged, or another version's.")
    if state["name"] != name:
        raise CheckpointError(
            f"The checkpoint is of a training with the teacher {state['name']!r}, and here it is {name!r}. Set it as "
            "it was."
        )


def _require_counting(model: nn.Module, name: str) -> None:
    """Raises AdapterError where other values of adapters would change nothing."""
    off = any(host.disable_adapters for _, host in hosts(model))
    if off or any(layer.merged_adapters for _, layer in lora_layers(model)):
        raise AdapterError(
            f"The teacher {name!r} is another state of the adapters, and they are "
            + ("switched off here. Leave disable_adapter() first." if off else "merged here. Call unmerge_adapter().")
        )
