"""Forward KL without the token that the data have next (arXiv:2605.29498)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.divergences.base import REMOVED
from lorafa.alignment.divergences.fkl import ForwardKL
from lorafa.alignment.entry import DivergenceEntry


@dataclass(frozen=True)
class MaskedTarget(ForwardKL):
    """KL(p || q) with the gold token taken out of both and the rest renormalized.

    Its gradient with respect to the logits is tau (q - p) off the gold token and 0 on it, so that it does not work
    against cross-entropy, which raises that one. It keeps what the teacher would say instead.
    """

    name = "masked_target"

    def prepared(self, logits: Tensor, gold: Tensor) -> Tensor:
        return logits.scatter(-1, gold[:, None], REMOVED)


MASKED_TARGET = DivergenceEntry(settings=MaskedTarget)
