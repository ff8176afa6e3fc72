"""The base as the teacher: the same weights without adapters, so that the student forgets less of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorafa.alignment.entry import TeacherEntry
from lorafa.alignment.teachers.base import Teacher, exchanged, trained
from lorafa.errors import AdapterError, CheckpointError
from lorafa.io.state import get_base_model_state_dict
from lorafa.storage.fingerprint import digest_of_all
from lorafa.surgery.activate import disabled
from lorafa.surgery.walk import hosts, lora_layers, uncompiled_name


class Base(Teacher):
    """The model with its adapters switched off, as it is where the training begins; it costs no memory.

    What is trained of the base itself, biases with ``bias="all"``, is kept: the teacher has it as it was.
    """

    name = "base"
    divergence = "masked_target"

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        if not any(True for _ in lora_layers(model)):
            raise AdapterError(
                "align=base compares a model with adapters and without, and this one has none. Put an adapter on it, "
                "or take another teacher."
            )
        self.values = {name: p.detach().clone() for name, p in _of_the_base(model).items()}

    def fingerprint(self, model: nn.Module) -> str:
        return digest_of_all(get_base_model_state_dict(model).items())

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        parameters = {uncompiled_name(name): p for name, p in model.named_parameters()} if self.values else {}
        if not self.values.keys() <= parameters.keys():
            raise AdapterError(
                f"The base has lost {min(self.values.keys() - parameters.keys())} since the alignment began, which was "
                "trained then. Begin the alignment with the model that is trained."
            )
        with disabled(model), exchanged(parameters, self.values):
            yield model

    def state_dict(self) -> dict[str, Any]:
        return {"values": {name: value.clone() for name, value in self.values.items()}} if self.values else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = state.get("values", {})
        if {name: value.shape for name, value in values.items()} != {n: v.shape for n, v in self.values.items()}:
            raise CheckpointError(
                "The checkpoint's teacher 'base' has values of other parameters than are trained of the base here. Set "
                "bias and what is trained as they were."
            )
        self.values = {name: value.to(self.values[name]) for name, value in values.items()}


def _of_the_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained and counts where adapters are off, by name."""
    adapters = {id(tensor) for _, host in hosts(model) for name in host.held() for tensor in host.tensors_of(name)}
    return {name: p for name, p in trained(model).items() if id(p) not in adapters}


BASE = TeacherEntry(make=Base)
