"""A teacher's distribution on a smaller alphabet: its likeliest tokens, and one letter for all the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

REMOVED = -1e30
"""The logit of a token that is taken out of a distribution: its probability is 0, and it stays a number."""


@dataclass(frozen=True)
class Letters:
    """What is kept of a teacher at n positions: logarithms of probabilities at one temperature.

    The gold token has its own beside them, so that it can be taken out whether or not it is among the likeliest, and
    without a difference of numbers that are nearly equal.
    """

    ids: Tensor
    """The k likeliest tokens, (n, k)."""
    likely: Tensor
    """Their logarithms, (n, k), float32 or wider."""
    gold: Tensor
    """The logarithm of the gold token, (n,)."""
    rest: Tensor
    """The logarithm of all others together, (n,): tokens neither among the likeliest nor the gold one."""

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor, gold: Tensor, top_k: int, temperature: float = 1.0) -> Letters:
        """Make them of logits (n, vocabulary), float32 or wider, where ``gold`` (n,) comes next."""
        log_p = (logits / temperature).log_softmax(dim=-1)
        likely, ids = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
        said = log_p.gather(1, gold[:, None])[:, 0]
        others = log_p.scatter(1, ids, REMOVED).scatter(1, gold[:, None], REMOVED)
        return cls(ids, likely, said, others.logsumexp(dim=-1).clamp_min(REMOVED))

    @classmethod
    def joined(cls, parts: Sequence[Letters]) -> Letters:
        """Put several stretches of positions one after another."""
        return cls(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)))

    def __len__(self) -> int:
        return len(self.gold)

    def __getitem__(self, places: slice) -> Letters:
        return Letters(*(getattr(self, one.name)[places] for one in fields(self)))

    def to(self, device: torch.device, dtype: torch.dtype) -> Letters:
        """The same on a device, and with logarithms of a dtype."""
        likely, gold, rest = (tensor.to(device, dtype) for tensor in (self.likely, self.gold, self.rest))
        return Letters(self.ids.to(device, torch.int64), likely, gold, rest)

    def log_probs(self, gold: Tensor, without_gold: bool) -> Tensor:
        """The distribution (n, k + 1) on the letters, the rest last, with or without the gold token in it."""
        is_gold = self.ids == gold[:, None]
        if without_gold:
            likely, rest = self.likely.masked_fill(is_gold, REMOVED), self.rest
        else:
            likely = self.likely
            rest = torch.where(is_gold.any(dim=-1), self.rest, torch.logaddexp(self.rest, self.gold))
        return torch.cat([likely, rest[:, None]], dim=-1).log_softmax(dim=-1)

    def gathered(self, log_q: Tensor) -> Tensor:
        """A distribution over all tokens (n, vocabulary) on the letters, (n, k + 1)."""
        rest = log_q.scatter(1, self.ids, REMOVED).logsumexp(dim=-1, keepdim=True)
        return torch.cat([log_q.gather(1, self.ids), rest], dim=-1)

    def spread(self, log_q: Tensor, rest: Tensor, slope: Tensor) -> Tensor:
        """The gradient with respect to logits of all tokens from that of the letters, (n, k + 1).

        Args:
            log_q: the distribution over all tokens (n, vocabulary); it is overwritten.
            rest: its rest (n, 1).
        """
        shares = log_q.scatter_(1, self.ids, REMOVED).sub_(rest).exp_()
        return shares.mul_(slope[:, -1:]).scatter_(1, self.ids, slope[:, :-1])
