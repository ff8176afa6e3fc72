"""The masks of the fused path's dropout: exact, reproducible, of the right rate, and without structure."""

from __future__ import annotations

import pytest
import torch

from lorafa.numerics.masks import draw_seed, drop_, dropout_probability, dropped_into, keep_mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masked_values_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(33, 17).to(dtype)
    x[0, :5] = torch.tensor([0.0, -0.0, float("inf"), -1.0, 65504.0]).to(dtype)
    mask = keep_mask(*x.shape, 0.5, 3, x.device)
    assert set(mask.unique().tolist()) == {0, 1}
    expected = torch.where(mask != 0, x, torch.zeros_like(x))
    in_place = x.clone()
    drop_(in_place, mask)
    assert torch.equal(in_place, expected)
    assert torch.equal(dropped_into(mask, x), expected)


def test_mask_is_the_same_each_time_it_is_drawn_and_changes_with_the_seed() -> None:
    cpu = torch.device("cpu")
    assert torch.equal(keep_mask(40, 25, 0.3, 12345, cpu), keep_mask(40, 25, 0.3, 12345, cpu))
    other = keep_mask(40, 25, 0.3, 12346, cpu) != 0
    agree = ((keep_mask(40, 25, 0.3, 12345, cpu) != 0) == other).float().mean()
    assert abs(agree - (0.7**2 + 0.3**2)) < 5 * (0.58 * 0.42 / 1000) ** 0.5


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 3), (1, 5), (63, 1), (64, 7), (65, 3), (200, 2)], ids=str)
def test_mask_of_any_shape_is_zeros_and_ones(shape: tuple[int, int]) -> None:
    mask = keep_mask(*shape, 0.5, 9, torch.device("cpu"))
    assert mask.shape == shape
    assert set(mask.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("p", [0.0001, 0.05, 0.25, 0.5, 0.9, 0.9999])
def test_share_of_dropped_elements_is_the_probability(p: float) -> None:
    n = 2_000_000
    dropped = (keep_mask(1, n, p, 77, torch.device("cpu")) == 0).double().mean().item()
    used = dropout_probability(p)
    assert abs(used - p) <= 2**-16 + 1e-12
    assert abs(dropped - used) < 5 * (used * (1 - used) / n) ** 0.5


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_probability_is_never_rounded_to_never_or_always(p: float) -> None:
    assert 0 < dropout_probability(p) < 1


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789])
def test_elements_of_a_mask_are_independent(seed: int) -> None:
    """Correlation of the mask with itself shifted: of order 1/sqrt(n) at every lag, lanes of one word included."""
    n, p = 1_000_000, 0.3
    dropped = (keep_mask(1, n, p, seed, torch.device("cpu"))[0] == 0).double() - dropout_probability(p)
    variance = p * (1 - p)
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 64, 576, 1000, 4096):
        correlation = (dropped[lag:] * dropped[:-lag]).mean().item() / variance
        assert abs(correlation) < 5 / (n - lag) ** 0.5, lag


def test_groups_of_eight_elements_take_every_pattern_equally_often() -> None:
    """Chi-square over the 256 patterns of neighbours at p = 1/2: 255 +- 5 sqrt(2 * 255)."""
    n = 1_600_000
    bits = (keep_mask(1, n, 0.5, 5, torch.device("cpu")) != 0).long().view(-1, 8)
    counts = torch.bincount((bits * 2 ** torch.arange(8)).sum(1), minlength=256).double()
    expected = n / 8 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_masks_of_neighbouring_seeds_are_not_shifts_of_each_other() -> None:
    n, cpu = 20_000, torch.device("cpu")
    first = (keep_mask(1, n, 0.5, 1, cpu)[0] != 0).double() - 0.5
    second = (keep_mask(1, n, 0.5, 2, cpu)[0] != 0).double() - 0.5
    for lag in range(-40, 41):
        moved = second.roll(lag)
        assert abs((first * moved).mean().item() / 0.25) < 5 / n**0.5


def test_seeds_cover_the_range_and_do_not_repeat() -> None:
    seeds = {draw_seed() for _ in range(1000)}
    assert len(seeds) == 1000
    assert max(seeds) > 2**62
