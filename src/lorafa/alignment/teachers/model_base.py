"""The base as the teacher: the same weights without adapters, so that the student forgets less of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorafa.alignment.entry import TeacherEntry
from lorafa.alignment.teachers.base import Teacher
from lorafa.errors import AdapterError
from lorafa.io.state import get_base_model_state_dict
from lorafa.storage.fingerprint import digest_of_all
from lorafa.surgery.activate import disabled
from lorafa.surgery.walk import lora_layers


class Base(Teacher):
    """The model with its adapters switched off; it costs no memory."""

    name = "base"
    divergence = "masked_target"

    def begin(self, model: nn.Module) -> None:
        if not any(True for _ in lora_layers(model)):
            raise AdapterError(
                "align=base compares a model with adapters and without, and this one has none. Put an adapter on it, "
                "or take another teacher."
            )

    def fingerprint(self, model: nn.Module) -> str:
        return digest_of_all(get_base_model_state_dict(model).items())

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        with disabled(model):
            yield model


BASE = TeacherEntry(make=Base)
