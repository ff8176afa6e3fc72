"""The loss of a model that rescores n-best lists: expected word errors, and a penalty on correlated features.

Low-rank rescoring (LoRB, Yu et al. 2023, arXiv:2309.15223). A first system writes several hypotheses for one utterance,
each with a cost; a second model adds a cost of its own, and the hypothesis with the lowest total is chosen. What is
minimized is the number of errors expected where a hypothesis is drawn by its total cost (MWER).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.errors import ConfigError, DataError


@dataclass(frozen=True)
class RescoringLoss:
    """``mwer_loss + weight * correlation_penalty``, as one object for a training loop: to the expected errors is added
    ``weight * ||R - I||_F^2``."""

    beta: float = 1.0
    """What the second score counts beside the first-pass cost, above 0."""
    weight: float = 0.01
    """What the penalty counts beside the expected errors (lambda in the paper), 0 or more."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ConfigError(f"beta is a number above 0, found {self.beta!r}: with 0 the model would not count.")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"The weight of the correlation penalty is a number from 0 on, found {self.weight!r}.")

    def __call__(self, scores: Tensor, first_pass: Tensor, errors: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
        """The loss of a batch of lists, a scalar.

        Args:
            scores, first_pass, errors, mask: as in :func:`mwer_loss`.
            vectors: (hypotheses of all lists, width), what the head has read, without padding.
        """
        expected, penalty = self.terms(scores, first_pass, errors, mask, vectors)
        return expected + self.weight * penalty

    def terms(
        self, scores: Tensor, first_pass: Tensor, errors: Tensor, mask: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both before they are weighed: expected errors above the mean, and the penalty. Arguments as of a call."""
        return mwer_loss(scores, first_pass, errors, mask, self.beta), correlation_penalty(vectors)


def total_costs(scores: Tensor, first_pass: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """``first_pass + beta * scores`` in float32 at least, and infinity where there is no hypothesis; lower is better.

    Args:
        scores: (lists, hypotheses), costs of the second model.
        first_pass: the same shape, costs of the first system.
        mask: the same shape, True where there is a hypothesis and False on padding, whatever else stands there.
        beta: what the second score counts.

    Raises:
        DataError: the shapes differ, the mask is not of booleans, or a list has no hypothesis.
    """
    if not scores.shape == first_pass.shape == mask.shape or scores.dim() != 2:
        raise DataError(
            "Scores, first-pass costs and mask have one shape (lists, hypotheses), found "
            f"{tuple(scores.shape)}, {tuple(first_pass.shape)} and {tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        raise DataError(f"The mask is of booleans, True where there is a hypothesis, found {mask.dtype}.")
    if not bool(mask.any(1).all()):
        raise DataError("A list has no hypothesis: its mask is False throughout. Leave such lists out of the batch.")
    wide = torch.promote_types(torch.promote_types(scores.dtype, first_pass.dtype), torch.float32)
    return (first_pass.to(wide) + beta * scores.to(wide)).masked_fill(~mask, float("inf"))


def mwer_loss(scores: Tensor, first_pass: Tensor, errors: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """The expected number of word errors above that of the list's mean, a mean over lists; a scalar.

    ``sum_i P_i (e_i - mean(e))`` with ``P = softmax(-S)`` and ``S = first_pass + beta * scores`` (Prabhavalkar et al.
    2018, arXiv:1712.01818, as LoRB uses it). It is 0 where all hypotheses of a list have equally many errors,
    does not change where all costs of a list move by one number, and is never below ``min(e) - mean(e)``. In float32
    at least; padding has no part in it, nor in any gradient.

    Args:
        scores, first_pass, mask, beta: as in :func:`total_costs`.
        errors: (lists, hypotheses), word errors of each hypothesis.

    Raises:
        DataError: as :func:`total_costs`, or the errors are of another shape.
    """
    costs = total_costs(scores, first_pass, mask, beta)
    if errors.shape != costs.shape:
        raise DataError(f"There are errors of shape {tuple(errors.shape)} for scores of shape {tuple(costs.shape)}.")
    counted = errors.to(costs.dtype).masked_fill(~mask, 0.0)
    above = counted - counted.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (torch.softmax(-costs, 1) * above).sum(1).mean()


def correlation_penalty(vectors: Tensor) -> Tensor:
    """How far the features of a batch of vectors are correlated: ``||R - I||_F^2``; a scalar, 0 or more.

    R is the correlation matrix (width, width) of the features. The diagonal of R - I is 0, so the squares of width
    (width - 1) correlations are summed, and the sum lies between 0 and that number. It grows with the square of the
    width: n vectors of more features than that, even drawn at random, have a sum of about width^2 / n. The weight is to
    be chosen with that in mind.

    A feature that is the same in all vectors has no correlation, and counts as 0; so do all of a single vector.

    Args:
        vectors: (batch, width), what the head reads of each hypothesis; no padding among them.

    Raises:
        DataError: they are no matrix, or have fewer than two features.
    """
    if vectors.dim() != 2 or vectors.shape[1] < 2:
        raise DataError(f"Vectors are of shape (batch, width) with a width of 2 or more, found {tuple(vectors.shape)}.")
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    centred = wide - wide.mean(0)
    spread = torch.linalg.vector_norm(centred, dim=0)
    # What rounding leaves of a constant feature is no spread.
    constant = spread <= 8 * torch.finfo(wide.dtype).eps * torch.linalg.vector_norm(wide, dim=0)
    unit = (centred / spread.masked_fill(constant, 1.0)).masked_fill(constant, 0.0)
    width = vectors.shape[1]
    apart = (unit.T @ unit).masked_fill(torch.eye(width, dtype=torch.bool, device=wide.device), 0.0)
    penalty: Tensor = apart.square().sum()
    return penalty
