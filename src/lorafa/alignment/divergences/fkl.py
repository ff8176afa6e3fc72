"""Forward KL, KL(p || q): what distillation minimizes (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.divergences.base import OfDistributions
from lorafa.alignment.entry import DivergenceEntry


@dataclass(frozen=True)
class ForwardKL(OfDistributions):
    """tau^2 sum p (log p - log q), with the gradient tau (q - p); the student covers all that the teacher may say."""

    name = "fkl"

    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    def slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(dim=-1)
        return value, log_q.exp_().sub_(p)


FKL = DivergenceEntry(settings=ForwardKL)
