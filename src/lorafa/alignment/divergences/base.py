"""What every divergence answers to, and the frame of those that are functions of two distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafa.settings.checks import check_number

REMOVED = -1e30
"""The logit of a token that is taken out of a distribution: its probability is 0, and it stays a number."""


@dataclass(frozen=True)
class Divergence(ABC):
    """A distance from the teacher's distribution p over the next token to the student's q, position by position.

    It is written twice: :meth:`__call__` is the definition, which autograd differentiates; :meth:`with_gradient` gives
    the same and its gradient in closed form, in the memory it is given. A law says that the two agree.
    """

    temperature: float = 1.0
    """Both distributions are softmax(logits / temperature)."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "a number above 0", 0.0)

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
        """The divergence at each position, (n,), in the dtype of the logits.

        Args:
            student: logits (n, vocabulary), float32 or wider.
            teacher: logits of the same shape and dtype.
            gold: the token that comes next in the data, (n,).
        """

    @abstractmethod
    def with_gradient(self, student: Tensor, teacher: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence (n,) and its gradient with respect to the student's logits, (n, vocabulary).

        Takes no part in autograd. The logits, as in :meth:`__call__`, may be overwritten.
        """


@dataclass(frozen=True)
class OfDistributions(Divergence):
    """A divergence that is a function of log p and log q, times a power of the temperature."""

    power: ClassVar[int] = 2
    """The power: 2 keeps the size of gradients when the temperature rises, as in distillation (arXiv:1503.02531)."""

    @abstractmethod
    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence (n,) of two distributions over any alphabet, (n, letters) each."""

    @abstractmethod
    def slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`of`, and its gradient with respect to logits of q (n, letters); may overwrite ``log_q``."""

    def __call__(self, student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
        student, teacher = self.prepared(student, gold), self.prepared(teacher, gold)
        log_q = (student / self.temperature).log_softmax(dim=-1)
        log_p = (teacher / self.temperature).log_softmax(dim=-1)
        return self.of(log_p, log_q) * self.temperature**self.power

    @torch.no_grad()
    def with_gradient(self, student: Tensor, teacher: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = self.prepared(student, gold), self.prepared(teacher, gold)
        if self.temperature != 1.0:
            student, teacher = student / self.temperature, teacher / self.temperature
        value, grad = self.slope(teacher.log_softmax(dim=-1), student.log_softmax(dim=-1))
        if self.temperature != 1.0:
            value = value * self.temperature**self.power
            grad = grad.mul_(self.temperature ** (self.power - 1))
        return value, grad

    def prepared(self, logits: Tensor, gold: Tensor) -> Tensor:
        """The logits that the distributions are made of."""
        return logits


def through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient with respect to logits u, q = softmax(u), of what has the gradient ``slope`` with respect to q.

    That is q (slope - sum q slope), (n, letters); overwrites ``slope``.
    """
    mean = (q * slope).sum(dim=-1, keepdim=True)
    return slope.sub_(mean).mul_(q)
