"""What is done with several updates of one tensor to make one: sums, pruning, elected signs. The names are PEFT's.

Task arithmetic: Ilharco et al. 2022, arXiv:2212.04089. TIES: Yadav et al. 2023, arXiv:2306.01708. DARE: Yu et al. 2023,
arXiv:2311.03099. Where a function takes ``task_tensors``, these are n tensors of one shape, and ``weights`` is (n,).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.settings.checks import check_choice, check_number

MAJORITY_SIGN_METHODS = ("total", "frequency")
"""How the sign of an entry is elected: by the sum of its values, or by the sum of their signs."""
PRUNE_METHODS = ("magnitude", "random")


def check_density(density: object) -> None:
    """Raises ConfigError unless ``density`` is a number in (0, 1]."""
    check_number("density", density, "the share of entries that is kept, in (0, 1]", 0, 1, closed="]")


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum, of the shape of one of them."""
    return _weighted_sum(task_tensors, weights)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the tensors with their smallest entries set to zero.

    Raises:
        ConfigError: ``density`` is not in (0, 1].
    """
    return _weighted_sum((prune(tensor, density, "magnitude") for tensor in task_tensors), weights)


def dare_linear(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """The weighted sum of the tensors with random entries dropped and the others divided by ``density``.

    On average over the draws that is the weighted sum itself (DARE, section 3.2).

    Args:
        generator: what the masks are drawn from, on the CPU; None: torch's own.

    Raises:
        ConfigError: ``density`` is not in (0, 1].
    """
    return _weighted_sum(
        (prune(tensor, density, "random", rescale=True, generator=generator) for tensor in task_tensors), weights
    )


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """TIES: trim small entries, elect a sign for each place, and average those that agree with it (section 3).

    Signs are elected without the weights, as in PEFT.

    Raises:
        ConfigError: ``density`` is not in (0, 1], or the method is not one of ``MAJORITY_SIGN_METHODS``.
    """
    pruned = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return _by_majority(pruned, weights, majority_sign_method)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: str = "total",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """TIES of tensors that are pruned at random, as :func:`dare_linear` does, and not by size.

    Raises:
        ConfigError: as :func:`ties`.
    """
    pruned = [prune(tensor, density, "random", rescale=True, generator=generator) for tensor in task_tensors]
    return _by_majority(pruned, weights, majority_sign_method)


def prune(
    tensor: Tensor, density: float, method: str, rescale: bool = False, *, generator: torch.Generator | None = None
) -> Tensor:
    """The tensor with a share of its entries set to zero; itself where ``density`` is 1.

    Args:
        density: the share that stays. "magnitude" keeps the floor(density * numel) entries of largest size, "random"
            each one with this probability.
        method: "magnitude" or "random".
        rescale: divide by ``density`` what "random" keeps, so that the mean stays.
        generator: what "random" draws from, on the CPU, so that the draw is the same on all devices; None: torch's own.

    Raises:
        ConfigError: ``density`` is not in (0, 1], or there is no such method.
    """
    check_density(density)
    check_choice("method", method, PRUNE_METHODS)
    if density == 1:
        return tensor
    if method == "magnitude":
        kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        kept[tensor.abs().flatten().topk(int(density * tensor.numel()), sorted=False).indices] = True
        return torch.where(kept.view(tensor.shape), tensor, 0)
    drawn = torch.rand(tensor.shape, generator=generator) < density
    return torch.where(drawn.to(tensor.device), tensor / density if rescale else tensor, 0)


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where each of the tensors stacked in (n, ...) has the elected sign, (n, ...); an entry of zero has none.

    Raises:
        ConfigError: the method is not one of ``MAJORITY_SIGN_METHODS``.
    """
    return tensor.sign() == _elected(tensor.unbind(), method)


def disjoint_merge(task_tensors: Iterable[Tensor], majority_sign_mask: Iterable[Tensor]) -> Tensor:
    """The sum over the tensors of what their masks choose, divided by how many masks choose it (at least 1)."""
    total: Tensor | None = None
    count: Tensor | None = None
    for tensor, mask in zip(task_tensors, majority_sign_mask, strict=True):
        chosen = torch.where(mask.to(torch.bool), tensor, 0)
        total = chosen if total is None else total + chosen
        count = mask.to(torch.int32) if count is None else count + mask
    if total is None or count is None:
        raise ConfigError("disjoint_merge was given no tensors, so there is nothing to merge.")
    return total / count.clamp(min=1)


def _by_majority(tensors: Sequence[Tensor], weights: Tensor, method: str) -> Tensor:
    sign = _elected(tensors, method)
    return disjoint_merge(_weighted(tensors, weights), (tensor.sign() == sign for tensor in tensors))


def _elected(tensors: Iterable[Tensor], method: str) -> Tensor:
    """1 or -1 for each place; 1 where the votes are even."""
    check_choice("majority_sign_method", method, MAJORITY_SIGN_METHODS)
    votes = (tensor.sign() if method == "frequency" else tensor for tensor in tensors)
    return torch.where(_sum(votes) >= 0, 1, -1)


def _weighted(tensors: Iterable[Tensor], weights: Tensor) -> Iterator[Tensor]:
    """Each tensor times its weight, one at a time: an update of a large layer is not kept n times more."""
    return (tensor * float(weight) for tensor, weight in zip(tensors, weights, strict=True))


def _weighted_sum(tensors: Iterable[Tensor], weights: Tensor) -> Tensor:
    return _sum(_weighted(tensors, weights))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor.clone() if total is None else total.add_(tensor)
    if total is None:
        raise ConfigError("No tensors were given, so there is nothing to merge.")
    return total
