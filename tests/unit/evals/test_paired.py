"""Differences item by item: equal to the textbook's paired interval, weighed as a ratio, refused for other items."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from lorafa.errors import DataError
from lorafa.evals.entry import Measured
from lorafa.evals.intervals import normal_point
from lorafa.evals.paired import mean_interval, paired_difference


def test_without_weights_it_is_the_interval_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 3.0]
    mean, low, high = mean_interval(Measured("x", values))
    half = 1.959964 * statistics.stdev(values) / math.sqrt(len(values))
    assert (mean, low, high) == pytest.approx((1.0, 1.0 - half, 1.0 + half), rel=1e-6)


def test_what_the_items_have_in_common_does_not_widen_the_difference() -> None:
    base = [float(10 * number) for number in range(50)]
    better = [value - 1.0 for value in base]
    difference = paired_difference(Measured("loss", better), Measured("loss", base))
    assert difference == pytest.approx((-1.0, -1.0, -1.0))


def test_of_weighed_items_the_interval_covers_the_ratio_as_often_as_it_says() -> None:
    rng, covered, rounds, truth = random.Random(0), 0, 400, 0.0
    for _ in range(rounds):
        weights = [rng.choice([1.0, 5.0, 20.0]) for _ in range(120)]
        values = [rng.gauss(0.0, 1.0) for _ in weights]
        _, low, high = mean_interval(Measured("loss", values, weights))
        covered += low <= truth <= high
    assert 0.91 <= covered / rounds <= 0.98


def test_items_on_which_both_agree_are_no_certainty_where_they_are_few() -> None:
    right = Measured("accuracy", [0.0, 0.0, 0.0, 0.0])
    difference, low, high = paired_difference(right, right)
    assert difference == 0.0
    assert low < -0.1 < 0.1 < high


def test_shares_have_the_interval_of_agresti_and_min() -> None:
    # 2005, Statistics in Medicine 24:729: with 1/2 added to each way, (b - c) / (n + 2) and its standard error
    one = Measured("accuracy", [1.0] * 30 + [0.0] * 10 + [1.0] * 12 + [0.0] * 5)
    other = Measured("accuracy", [1.0] * 30 + [0.0] * 10 + [0.0] * 12 + [1.0] * 5)
    difference, low, high = paired_difference(one, other)
    assert difference == pytest.approx(7 / 57)
    middle, error = 7 / 59, math.sqrt(18 - 49 / 59) / 59
    assert (low, high) == pytest.approx((middle - 1.959964 * error, middle + 1.959964 * error), rel=1e-5)


def test_a_single_item_has_no_interval() -> None:
    mean, low, high = mean_interval(Measured("loss", [2.0]))
    assert (mean, low, high) == (2.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    "other", [Measured("loss", [1.0]), Measured("accuracy", [1.0, 2.0]), Measured("loss", [1.0, 2.0], [1.0, 2.0])]
)
def test_other_items_are_refused(other: Measured) -> None:
    with pytest.raises(DataError, match="cannot be compared pair by pair"):
        paired_difference(Measured("loss", [1.0, 2.0]), other)


def test_intervals_of_several_differences_hold_together_as_often_as_one_does_alone() -> None:
    assert [normal_point(count) for count in (1, 2, 5)] == pytest.approx([1.959964, 2.241403, 2.575829], abs=1e-6)
    rng, held, alone, rounds, others = random.Random(1), 0, 0, 600, 6
    for _ in range(rounds):
        first = Measured("loss", [rng.gauss(0.0, 1.0) for _ in range(80)])
        several = [Measured("loss", [rng.gauss(0.0, 1.0) for _ in range(80)]) for _ in range(others)]
        for count in (1, others):
            bounds = [paired_difference(one, first, count)[1:] for one in several]
            together = all(low <= 0.0 <= high for low, high in bounds)
            held, alone = (held + together, alone) if count > 1 else (held, alone + together)
    assert held / rounds > 0.93
    assert alone / rounds < 0.88


def test_differences_of_shares_are_corrected_too() -> None:
    one, other = Measured("accuracy", [1.0] * 12 + [0.0] * 28), Measured("accuracy", [0.0] * 35 + [1.0] * 5)
    difference, low, high = paired_difference(one, other)
    corrected = paired_difference(one, other, 3)
    assert corrected[0] == difference
    assert (corrected[2] - corrected[1]) / (high - low) == pytest.approx(normal_point(3) / normal_point())
