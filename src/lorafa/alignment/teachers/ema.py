"""An average of the student over its steps, in the space of the product B A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorafa.alignment.entry import TeacherEntry
from lorafa.alignment.teachers.base import OfTheAdapters, copied
from lorafa.alignment.teachers.products import Pair, trained_pairs, weighed_sum
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class EmaSettings:
    """How fast the average follows."""

    ema_beta: float = 0.05
    """Share of the student in each step, above 0 and at most 1."""

    def __post_init__(self) -> None:
        check_number("align.ema_beta", self.ema_beta, "a number in (0, 1]", 0.0, 1.0, closed="]")


class EMA(OfTheAdapters):
    """Delta_T <- (1 - beta) Delta_T + beta Delta_S after each step, cut to the student's rank.

    The average is that of the updates, whatever basis A and B are in; averages of A and of B apart depend on it. A
    student that stays where it is has itself as the teacher.
    """

    name = "ema"
    follows = False
    each_step = True

    def __init__(self, ema_beta: float = 0.05) -> None:
        """``ema_beta`` is the share of the student in each step, above 0 and at most 1."""
        super().__init__()
        check_number("ema_beta", ema_beta, "a number in (0, 1]", 0.0, 1.0, closed="]")
        self.beta = ema_beta
        self._pairs: list[Pair] = []

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self._pairs = trained_pairs(model, f"align={self.name} averages")

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        self.require_same(model)
        self.values, self.discarded = weighed_sum(self._pairs, self.values, copied(model), self.beta)


EMA_OF_PRODUCTS = TeacherEntry(make=EMA, settings=EmaSettings)
