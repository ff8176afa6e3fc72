"""Mean squared error of logits, each position's centred: what KL becomes at high temperatures (arXiv:1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.entry import DivergenceEntry
from lorafa.errors import ConfigError


@dataclass(frozen=True)
class LogitMSE(Divergence):
    """The mean over the vocabulary of (z_S - z_T)^2, after each has lost its own mean."""

    name = "logit_mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1.0:
            raise ConfigError(f"logit_mse compares logits and has no temperature, found {self.temperature!r}.")

    def __call__(self, student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
        difference = student - teacher
        return (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=-1)

    @torch.no_grad()
    def with_gradient(self, student: Tensor, teacher: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
        difference = student.sub_(teacher)
        difference -= difference.mean(dim=-1, keepdim=True)
        return difference.square().mean(dim=-1), difference.mul_(2 / difference.shape[-1])


LOGIT_MSE = DivergenceEntry(settings=LogitMSE)
