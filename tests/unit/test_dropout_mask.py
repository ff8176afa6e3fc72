"""The mask is as good as independent coin flips over rows and columns, though it is made from one word of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafa.functional import dropout_probability, keep_mask

ROWS, COLUMNS = 1500, 577  # an odd number of columns: the last 16-bit lane of a row is cut off
CPU = torch.device("cpu")


def deviations(p: float, seed: int) -> Tensor:
    """(rows, columns): dropped minus its probability."""
    mask = keep_mask(torch.Size((ROWS, COLUMNS)), p, seed, CPU)
    assert set(mask.unique().tolist()) == {-1, 0}
    return (mask == 0).double() - dropout_probability(p)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("seed", [1, 2**62 + 5])
@pytest.mark.parametrize("step", [(0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (1, 2), (7, 0), (0, 16)])
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
    """A sum of a row word and a column word would tie them together; the rounds undo that."""
    d = deviations(0.5, 11)
    g = torch.Generator().manual_seed(0)
    up, low = torch.randperm(ROWS, generator=g)[:700], torch.randperm(ROWS, generator=g)[700:1400]
    low = torch.tensor([r for r in low.tolist() if r not in set(up.tolist())])
    left, right = torch.randperm(COLUMNS, generator=g)[:576].view(2, -1)
    up = up[: len(low)]
    corners = d[up][:, left] * d[up][:, right] * d[low][:, left] * d[low][:, right]
    z = corners.mean() / 0.5**4 * math.sqrt(corners.numel())
    assert abs(z) < 4.5


@pytest.mark.parametrize("p", [0.001, 0.05, 0.3])
def test_rate_is_the_probability_to_the_last_65536th(p: float) -> None:
    shape = torch.Size((3000, 1024))
    dropped = (keep_mask(shape, p, 5, CPU) == 0).double().mean()
    z = (dropped - dropout_probability(p)) / math.sqrt(p * (1 - p) / shape.numel())
    assert abs(z) < 4.5
    assert abs(dropout_probability(p) - p) <= 2**-17


def test_masks_of_different_seeds_are_uncorrelated() -> None:
    one, other = deviations(0.5, 21), deviations(0.5, 22)
    z = (one * other).mean() / 0.25 * math.sqrt(one.numel())
    assert abs(z) < 4.5


def test_a_mask_with_no_rows_is_empty() -> None:
    assert keep_mask(torch.Size((0, 8)), 0.5, 1, CPU).shape == (0, 8)
