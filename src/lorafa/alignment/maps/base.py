"""What every distance between inner states answers to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa.errors import ConfigError

ROWS = 64
"""Positions whose logits a map has at a time."""

Look = Callable[[Tensor], Tensor]
"""Hidden states (n, size) -> logits (n, vocabulary) in float32 or wider: what the model would say from here."""


@dataclass(frozen=True)
class States:
    """Inner states of one model at the supervised positions of a batch."""

    hidden: Tensor
    """(n, size), float32 or wider."""
    lens: Look | None = None
    """The model's own head, with the norm before it; None where the map reads none."""
    projection: nn.Linear | None = None
    """What is trained to bring the student's states to the size of the teacher's; None where the map has none."""


@dataclass(frozen=True)
class RepresentationMap(ABC):
    """A distance from the teacher's inner states to the student's, 0 where the two are alike."""

    name: ClassVar[str]
    reads_lens: ClassVar[bool] = False
    """Whether it looks at states through the heads of the two models."""
    any_width: ClassVar[bool] = True
    """Whether the two models may have states of different sizes."""
    one_vocabulary: ClassVar[bool] = False
    """Whether it compares what the two models would say, token by token."""
    projects: ClassVar[bool] = False
    """Whether a linear map is trained with it, which :attr:`States.projection` is."""

    def __call__(self, student: States, teacher: States) -> Tensor:
        """The distance, a scalar that autograd differentiates with respect to the student's states.

        Raises:
            ConfigError: the two have states of other sizes, and this distance is none between such.
        """
        H, T = student.hidden, teacher.hidden
        if not self.any_width and H.shape[-1] != T.shape[-1]:
            raise ConfigError(
                f"align.map={self.name} compares states number by number, and student and teacher have states of "
                f"{H.shape[-1]} and {T.shape[-1]} numbers. Take proj, gram, procrustes or lens."
            )
        return self.between(student, teacher)

    @abstractmethod
    def between(self, student: States, teacher: States) -> Tensor:
        """The same for states that fit."""


def on_shared(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, ...) on the tokens that both tables have: heads are often filled up to another multiple."""
    shared = min(one.shape[-1], other.shape[-1])
    return one[:, :shared].contiguous(), other[:, :shared].contiguous()


def square(states: Tensor) -> Tensor:
    """The sum of all squares, never 0."""
    return states.square().sum().clamp_min(torch.finfo(states.dtype).tiny)


def mean_of_rows(of_rows: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, at_once: int) -> Tensor:
    """The mean of ``of_rows`` (rows, ...) -> (rows,) over all rows, some at a time.

    What it makes of a piece is made again for the backward pass, and never there for all rows.
    """
    pieces = zip(torch.split(student, at_once), torch.split(teacher, at_once), strict=True)
    found = [checkpoint(of_rows, one, other, use_reentrant=False) for one, other in pieces]
    return torch.cat(found).mean()
