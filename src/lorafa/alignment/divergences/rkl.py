"""Reverse KL, KL(q || p): the student keeps to what the teacher finds likely (arXiv:2306.08543)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.divergences.base import OfDistributions, through_softmax
from lorafa.alignment.entry import DivergenceEntry


@dataclass(frozen=True)
class ReverseKL(OfDistributions):
    """tau^2 sum q (log q - log p)."""

    name = "rkl"

    def of(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1)

    def slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        ratio = log_q.sub_(log_p)
        value = (q * ratio).sum(dim=-1)
        return value, through_softmax(q, ratio)  # a constant slope adds nothing


RKL = DivergenceEntry(settings=ReverseKL)
