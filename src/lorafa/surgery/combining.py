"""How adapters are to be combined: the settings, and the table of combination types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.errors import AdapterError, ConfigError, warn
from lorafa.numerics.task_arithmetic import (
    MAJORITY_SIGN_METHODS,
    check_density,
    dare_linear,
    dare_ties,
    magnitude_prune,
    task_arithmetic,
    ties,
)
from lorafa.settings.checks import check_choice, check_flag, check_int, check_number, repeated

DRIVERS = ("gesvd", "gesvdj", "gesvda")
"""cuSOLVER's methods for an SVD."""


@dataclass(frozen=True)
class Combining:
    """How adapters are combined; fields and defaults are the arguments of PEFT's ``add_weighted_adapter``.

    Raises:
        ConfigError: a value is not allowed, or one that the type needs is missing.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    """Rank of the result of the types that end in "svd"; None: the largest rank that is combined, layer by layer."""
    svd_clamp: float | None = None
    """Clamp the entries of both factors to +-c, where c is this quantile of the entries and their negatives together,
    in (0.5, 1]."""
    svd_full_matrices: bool = True
    """Not read: the triplets that are kept are the same."""
    svd_driver: str | None = None
    """The method of cuSOLVER, on CUDA."""
    density: float | None = None
    """The share of entries that pruning keeps, in (0, 1]."""
    majority_sign_method: str = "total"
    """How TIES elects signs."""
    seed: int | None = None
    """What the masks of DARE are drawn from; None: ``torch.initial_seed()``."""

    def __post_init__(self) -> None:
        check_choice("combination_type", self.combination_type, COMBINATIONS)
        check_choice("majority_sign_method", self.majority_sign_method, MAJORITY_SIGN_METHODS)
        check_flag("svd_full_matrices", self.svd_full_matrices)
        if self.svd_rank is not None:
            check_int("svd_rank", self.svd_rank, at_least=1)
        if self.svd_clamp is not None:
            check_number("svd_clamp", self.svd_clamp, "a quantile in (0.5, 1]", 0.5, 1, closed="]")
        if self.svd_driver is not None:
            check_choice("svd_driver", self.svd_driver, DRIVERS)
        if self.density is not None:
            check_density(self.density)
        if self.seed is not None:
            check_int("seed", self.seed, at_least=0)
        if self.rule.prunes and self.density is None:
            raise ConfigError(
                f"combination_type={self.combination_type!r} needs density, the share of entries that is kept. Pass "
                "density=0.5, for example."
            )
        unread = [] if self.rule.prunes or self.density is None else ["density"]
        unread += [n for n in ("svd_rank", "svd_clamp", "svd_driver") if not self.rule.cuts and getattr(self, n)]
        if unread:
            warn(f"combination_type={self.combination_type!r} does not read {', '.join(unread)}: it changes nothing.")

    @property
    def rule(self) -> Rule:
        return COMBINATIONS[self.combination_type]

    @property
    def keeps_one(self) -> bool:
        """Whether one adapter of weight 1 comes out as it is."""
        return self.svd_rank is None and self.svd_clamp is None and self.density in (None, 1)

    def say_what_it_adds(self, count: int) -> None:
        """Warn where ``count`` adapters are summed factor by factor."""
        if self.rule.of_factors and not self.rule.prunes and count > 1:
            warn(
                f"combination_type={self.combination_type!r} sums A with A and B with B, as PEFT does, and their "
                "product has the B of each adapter with the A of every other one: it is not the weighted sum of the "
                "updates, often not nearly. Take 'cat' or 'svd' for that sum."
            )


Family = Callable[[Sequence[Tensor], Tensor, Combining, torch.Generator], Tensor]
"""(n tensors, n weights, settings, source of randomness) -> one tensor."""


@dataclass(frozen=True)
class Rule:
    """One combination type."""

    family: Family | None = None
    """What makes one tensor of several; None: the weighted sum of the updates, as a product of stacked factors."""
    of_factors: bool = False
    """Whether that is done with all A and with all B, each for itself, as PEFT's types without "svd" do."""
    cuts: bool = False
    """Whether an SVD brings the result to a rank."""
    prunes: bool = False


def _sum(tensors: Sequence[Tensor], weights: Tensor, asked: Combining, source: torch.Generator) -> Tensor:
    return task_arithmetic(tensors, weights)


def _magnitude(tensors: Sequence[Tensor], weights: Tensor, asked: Combining, source: torch.Generator) -> Tensor:
    return magnitude_prune(tensors, weights, _density(asked))


def _ties(tensors: Sequence[Tensor], weights: Tensor, asked: Combining, source: torch.Generator) -> Tensor:
    return ties(tensors, weights, _density(asked), asked.majority_sign_method)


def _dare(tensors: Sequence[Tensor], weights: Tensor, asked: Combining, source: torch.Generator) -> Tensor:
    return dare_linear(tensors, weights, _density(asked), generator=source)


def _dare_ties(tensors: Sequence[Tensor], weights: Tensor, asked: Combining, source: torch.Generator) -> Tensor:
    return dare_ties(tensors, weights, _density(asked), asked.majority_sign_method, generator=source)


def _density(asked: Combining) -> float:
    assert asked.density is not None  # checked where it was made
    return asked.density


COMBINATIONS: Mapping[str, Rule] = {
    "svd": Rule(cuts=True),
    "linear": Rule(_sum, of_factors=True),
    "cat": Rule(),
    "ties": Rule(_ties, of_factors=True, prunes=True),
    "ties_svd": Rule(_ties, cuts=True, prunes=True),
    "dare_ties": Rule(_dare_ties, of_factors=True, prunes=True),
    "dare_linear": Rule(_dare, of_factors=True, prunes=True),
    "dare_ties_svd": Rule(_dare_ties, cuts=True, prunes=True),
    "dare_linear_svd": Rule(_dare, cuts=True, prunes=True),
    "magnitude_prune": Rule(_magnitude, of_factors=True, prunes=True),
    "magnitude_prune_svd": Rule(_magnitude, cuts=True, prunes=True),
}
"""Every combination type, by PEFT's name."""


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The weights as numbers, one an adapter.

    Raises:
        AdapterError: no adapter is named, or one twice; or there is another number of weights.
        ConfigError: a weight is not a finite number.
    """
    if isinstance(adapters, str) or isinstance(weights, (str, int, float)):
        raise AdapterError(
            f"Adapters and weights are given as lists, found {adapters!r} and {weights!r}. Pass [{adapters!r}] and "
            f"[{weights!r}]."
        )
    if not isinstance(adapters, Iterable) or not isinstance(weights, Iterable):
        raise AdapterError(f"Adapters and weights are given as lists, found {adapters!r} and {weights!r}.")
    adapters, weights = list(adapters), list(weights)
    if not adapters:
        raise AdapterError("No adapters are named, so there is nothing to combine. Name at least one.")
    if len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights were given: {', '.join(map(repr, adapters))} and "
            f"{', '.join(map(str, weights))}. Give each adapter one weight."
        )
    if twice := repeated(adapters):
        raise AdapterError(f"Adapter {twice[0]!r} is named twice. Name it once, with the sum of its weights.")
    for name, weight in zip(adapters, weights, strict=True):
        check_number(f"The weight of adapter {name!r}", weight, "a number", -math.inf)
    return [float(weight) for weight in weights]
