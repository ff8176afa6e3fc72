"""The mask is as good as independent coin flips, though the words of 64 rows times as many blocks make all of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafa.numerics.masks import dropout_probability, keep_mask

ROWS, COLUMNS = 1500, 577  # an odd number of columns: lanes of a word fall into two rows
CPU = torch.device("cpu")


def deviations(p: float, seed: int) -> Tensor:
    """(rows, columns): dropped minus its probability."""
    mask = keep_mask(ROWS, COLUMNS, p, seed, CPU)
    assert set(mask.unique().tolist()) == {0, 1}
    return (mask == 0).double() - dropout_probability(p)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("seed", [1, 2**62 + 5])
@pytest.mark.parametrize("step", [(0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (1, 2), (7, 0), (0, 16), (64, 0), (65, 1)])
def test_neighbours_in_rows_and_columns_are_uncorrelated(p: float, seed: int, step: tuple[int, int]) -> None:
    d, (down, right) = deviations(p, seed), step
    pairs = d[: ROWS - down, : COLUMNS - right] * d[down:, right:]
    z = pairs.mean() / (p * (1 - p)) * math.sqrt(pairs.numel())
    assert abs(z) < 4.5


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rows_and_columns_vary_as_much_as_independent_flips(p: float) -> None:
    d = deviations(p, 3)
    for dim, count in ((1, COLUMNS), (0, ROWS)):
        ratio = d.mean(dim).var() / (p * (1 - p) / count)
        spread = math.sqrt(2 / d.shape[1 - dim])
        assert abs(ratio - 1) < 5 * spread


def test_the_corners_of_a_rectangle_are_independent() -> None:
    """A sum of a row word and a column word would tie them together."""
    d = deviations(0.5, 11)
    g = torch.Generator().manual_seed(0)
    up, low = torch.randperm(ROWS, generator=g)[:700], torch.randperm(ROWS, generator=g)[700:1400]
    low = torch.tensor([r for r in low.tolist() if r not in set(up.tolist())])
    left, right = torch.randperm(COLUMNS, generator=g)[:576].view(2, -1)
    up = up[: len(low)]
    corners = d[up][:, left] * d[up][:, right] * d[low][:, left] * d[low][:, right]
    z = corners.mean() / 0.5**4 * math.sqrt(corners.numel())
    assert abs(z) < 4.5


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize(("place", "block"), [(1, 64), (5, 64), (1, 128), (17, 640)])
def test_two_places_in_two_blocks_are_independent(p: float, place: int, block: int) -> None:
    """The product of two of their words is the product of the other two. What is dropped must not show it."""
    d = deviations(p, 13)
    rows = [row for row in range(ROWS - block - place) if row % 64 < 64 - place and (row // block) % 2 == 0]
    first = torch.tensor(rows)
    corners = d[first] * d[first + place] * d[first + block] * d[first + block + place]
    z = corners.mean() / (p * (1 - p)) ** 2 * math.sqrt(corners.numel())
    assert abs(z) < 4.5


@pytest.mark.parametrize("p", [0.001, 0.05, 0.3])
def test_rate_is_the_probability_to_the_last_32768th(p: float) -> None:
    shape = torch.Size((3000, 1024))
    dropped = (keep_mask(*shape, p, 5, CPU) == 0).double().mean()
    z = (dropped - dropout_probability(p)) / math.sqrt(p * (1 - p) / shape.numel())
    assert abs(z) < 4.5
    assert abs(dropout_probability(p) - p) <= 2**-16


def test_masks_of_different_seeds_are_uncorrelated() -> None:
    one, other = deviations(0.5, 21), deviations(0.5, 22)
    z = (one * other).mean() / 0.25 * math.sqrt(one.numel())
    assert abs(z) < 4.5
