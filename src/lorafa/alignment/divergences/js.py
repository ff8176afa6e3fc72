"""Jensen-Shannon divergence, weighted (Lin 1991; for language models arXiv:2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.divergences.base import OfDistributions, mixture, through_softmax
from lorafa.alignment.entry import DivergenceEntry
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class JensenShannon(OfDistributions):
    """tau^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q; at beta = 1/2 at most ln 2."""

    beta: float = 0.5
    """The teacher's weight, above 0 and below 1."""

    name = "js"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, "a number between 0 and 1", 0.0, 1.0)

    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = mixture(log_p, log_q, self.beta)
        of_p = (log_p.exp() * (log_p - log_m)).sum(dim=-1)
        return self.beta * of_p + (1 - self.beta) * (log_q.exp() * (log_q - log_m)).sum(dim=-1)

    def slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m, q = mixture(log_p, log_q, self.beta), log_q.exp()
        ratio = log_q.sub_(log_m)
        value = (1 - self.beta) * (q * ratio).sum(dim=-1)
        value += self.beta * (log_p.exp() * log_p.sub(log_m)).sum(dim=-1)
        return value, through_softmax(q, ratio.mul_(1 - self.beta))


JS = DivergenceEntry(settings=JensenShannon)
