"""Another model as the teacher: frozen, in its own dtype, with the student's vocabulary or with any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorafa.alignment.teachers.base import Teacher, trained
from lorafa.errors import ConfigError
from lorafa.models.modes import evaluating
from lorafa.models.wrapped import inner_model
from lorafa.storage.fingerprint import digest_of_all


class External(Teacher):
    """A model of its own, which is called with the same inputs and never trained."""

    name = "external"
    starts_as_student = False

    def __init__(self, model: nn.Module) -> None:
        """``model`` is frozen where an alignment begins."""
        self.model = model

    def begin(self, model: nn.Module) -> None:
        own = {id(p): name for name, p in trained(model).items()}
        if (name := next((own[id(p)] for p in self.model.parameters() if id(p) in own), None)) is not None:
            raise ConfigError(
                f"The teacher is the student, or has layers of it that are trained ({name}): it would be frozen with "
                "the student in it. Take teacher='base' for the model without its adapters, 'snapshot' for it as it "
                "is now, or load the other model apart."
            )
        self.model.requires_grad_(False)

    def vocabulary(self) -> int | None:
        return vocabulary_of(self.model)

    def fingerprint(self, model: nn.Module) -> str:
        values = self.model.state_dict().items()
        return digest_of_all((name, value) for name, value in values if isinstance(value, Tensor))

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        with evaluating(self.model):
            yield self.model


def vocabulary_of(model: Any) -> int | None:
    """Rows of a model's output head; None where it has none."""
    base = inner_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return None if head is None else int(head.weight.shape[0])
