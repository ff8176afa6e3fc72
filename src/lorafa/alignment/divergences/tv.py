"""Total variation: half the sum of |p - q| (for language models arXiv:2307.15190)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.divergences.base import OfDistributions, through_softmax
from lorafa.alignment.entry import DivergenceEntry


@dataclass(frozen=True)
class TotalVariation(OfDistributions):
    """1/2 sum |p - q|, between 0 and 1 at any temperature."""

    name = "tv"
    power = 0

    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)

    def slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp_()
        difference = q - log_p.exp()
        value = 0.5 * difference.abs().sum(dim=-1)
        return value, through_softmax(q, difference.sign_().mul_(0.5))


TV = DivergenceEntry(settings=TotalVariation)
