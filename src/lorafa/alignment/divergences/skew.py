"""Skewed forward KL: the student's distribution is mixed with a little of the teacher's (arXiv:2402.03898)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.divergences.base import OfDistributions, mixture, through_softmax
from lorafa.alignment.entry import DivergenceEntry
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class SkewKL(OfDistributions):
    """tau^2 KL(p || (1 - a) q + a p): at most -tau^2 log a, however wrong the student is."""

    skew: float = 0.1
    """a, the teacher's share of the mixture, above 0 and below 1."""

    name = "skew"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("skew", self.skew, "a number between 0 and 1; for 0 take fkl", 0.0, 1.0)

    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - mixture(log_p, log_q, self.skew))).sum(dim=-1)

    def slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        ratio = log_p - mixture(log_p, log_q, self.skew)
        value = (log_p.exp() * ratio).sum(dim=-1)
        return value, through_softmax(log_q.exp_(), ratio.exp_().mul_(self.skew - 1))


SKEW = DivergenceEntry(settings=SkewKL)
