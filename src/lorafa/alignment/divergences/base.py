"""What every divergence answers to, and the frame of those that are functions of two distributions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorafa.alignment.divergences.letters import REMOVED, Letters
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class Divergence(ABC):
    """A distance from the teacher's distribution p over the next token to the student's q, position by position.

    It is written twice: :meth:`__call__` is the definition, which autograd differentiates; :meth:`with_gradient` gives
    the same and its gradient in closed form, in the memory it is given. A law says that the two agree.
    """

    temperature: float = 1.0
    """Both distributions are softmax(logits / temperature)."""

    name: ClassVar[str]
    takes_letters: ClassVar[bool] = False
    """Whether it can be taken of a teacher of which the likeliest tokens alone are kept."""

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

    def of_letters(self, student: Tensor, teacher: Letters, gold: Tensor) -> Tensor:
        """The divergence (n,) where the teacher's likeliest tokens are letters of their own, and all others are one.

        Both distributions are taken on that smaller alphabet, so that it is a divergence all the same: 0 for equal
        ones, and never above that of all tokens.

        Raises:
            ConfigError: it is none of distributions.
        """
        raise ConfigError(
            f"align.divergence={self.name} compares all logits, and a cache keeps the likeliest tokens of the teacher. "
            "Take another divergence, fkl for example, or no cache."
        )

    def of_letters_with_gradient(self, student: Tensor, teacher: Letters, gold: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`of_letters`, and its gradient with respect to all of the student's logits, (n, vocabulary)."""
        return self.of_letters(student, teacher, gold), student


@dataclass(frozen=True)
class OfDistributions(Divergence):
    """A divergence that is a function of log p and log q, times a power of the temperature.

    All of these fall, or stay, where tokens are put together to one letter (the data processing inequality).
    """

    power: ClassVar[int] = 2
    """The power: 2 keeps the size of gradients when the temperature rises, as in distillation (arXiv:1503.02531)."""
    takes_letters = True
    without_gold: ClassVar[bool] = False
    """Whether the gold token is taken out of both distributions."""

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

    def of_letters(self, student: Tensor, teacher: Letters, gold: Tensor) -> Tensor:
        log_q = (self.prepared(student, gold) / self.temperature).log_softmax(dim=-1)
        told = teacher.log_probs(gold, self.without_gold)
        return self.of(told, teacher.gathered(log_q)) * self.temperature**self.power

    @torch.no_grad()
    def of_letters_with_gradient(self, student: Tensor, teacher: Letters, gold: Tensor) -> tuple[Tensor, Tensor]:
        """The rest's share of the gradient goes to its tokens by what each is of it.

        Nothing is left out: with the rest as a letter all is differentiated, the normalizer too. (Reverse KL over the
        likeliest tokens alone would have to stop the gradient there: the sum is no divergence then.)
        """
        log_q = (self.prepared(student, gold) / self.temperature).log_softmax(dim=-1)
        letters = teacher.gathered(log_q)
        rest = letters[:, -1:].clone()
        value, slope = self.slope(teacher.log_probs(gold, self.without_gold), letters)
        grad = teacher.spread(log_q, rest, slope).mul_(self.temperature ** (self.power - 1))
        return value * self.temperature**self.power, grad

    def prepared(self, logits: Tensor, gold: Tensor) -> Tensor:
        """The logits that the distributions are made of."""
        return logits.scatter(-1, gold[:, None], REMOVED) if self.without_gold else logits


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), (n, letters), for a share above 0 and below 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient with respect to logits u, q = softmax(u), of what has the gradient ``slope`` with respect to q.

    That is q (slope - sum q slope), (n, letters); overwrites ``slope``.
    """
    mean = (q * slope).sum(dim=-1, keepdim=True)
    return slope.sub_(mean).mul_(q)
