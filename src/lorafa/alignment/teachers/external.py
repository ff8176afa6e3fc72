"""Another model as the teacher: frozen, in its own dtype, with the student's vocabulary or with any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorafa.alignment.teachers.base import Teacher
from lorafa.models.modes import evaluating


class External(Teacher):
    """A model of its own, which is called with the same inputs and never trained."""

    name = "external"
    starts_as_student = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        model.requires_grad_(False)

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        with evaluating(self.model):
            yield self.model
