"""Student's t and its intervals, against printed tables, closed forms and simulation."""

from __future__ import annotations

import math
import random

import pytest

from lorafa.runs.student import cdf, incomplete_beta, interval, quantile

TABLE = {
    (0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 5): 2.5706, (0.975, 9): 2.2622, (0.975, 30): 2.0423,
    (0.975, 120): 1.9799, (0.95, 1): 6.3138, (0.95, 10): 1.8125, (0.99, 4): 3.7469, (0.995, 3): 5.8409,
    (0.9995, 2): 31.5991, (0.9995, 60): 3.4602,
}  # fmt: skip
"""Abramowitz and Stegun, table 26.10."""


@pytest.mark.parametrize(("probability", "freedom"), TABLE)
def test_quantiles_are_those_of_the_printed_table(probability: float, freedom: int) -> None:
    assert quantile(probability, freedom) == pytest.approx(TABLE[probability, freedom], abs=5.1e-5)
    assert quantile(1 - probability, freedom) == pytest.approx(-TABLE[probability, freedom], abs=5.1e-5)


@pytest.mark.parametrize("p", [1e-12, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.999999])
def test_one_and_two_degrees_of_freedom_have_closed_forms(p: float) -> None:
    assert quantile(p, 1) == pytest.approx(-1 / math.tan(math.pi * p), rel=1e-9, abs=1e-12)
    assert quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4.5, 10, 100, 10_000])
@pytest.mark.parametrize("p", [1e-9, 0.0017, 0.2, 0.5, 0.8, 0.9975])
def test_the_quantile_is_the_inverse_of_the_distribution(p: float, freedom: float) -> None:
    assert cdf(quantile(p, freedom), freedom) == pytest.approx(p, rel=1e-10)


def test_with_many_degrees_of_freedom_it_is_the_normal_distribution() -> None:
    assert quantile(0.975, 1e7) == pytest.approx(1.959963984540054, rel=1e-6)


def test_the_incomplete_beta_function_has_its_known_values() -> None:
    assert [incomplete_beta(2, 3, x) for x in (0.0, 1.0)] == [0.0, 1.0]
    for x in (0.1, 0.5, 0.9):
        assert incomplete_beta(1, 1, x) == pytest.approx(x, rel=1e-14)
        assert incomplete_beta(2, 3, x) == pytest.approx(x * x * (6 - 8 * x + 3 * x * x), rel=1e-13)
        assert incomplete_beta(0.5, 0.5, x) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), rel=1e-13)


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 3), (1.0, 3), (0.5, 0), (math.nan, 3)])
def test_what_has_no_quantile_is_refused(probability: float, freedom: float) -> None:
    with pytest.raises(ValueError, match=r"A quantile needs 0 < probability < 1 and freedom > 0, found"):
        quantile(probability, freedom)


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["half_width"] == pytest.approx(4.30265 * 1.0 / 3**0.5, rel=1e-5)
    assert interval([1.0]) == {"mean": 1.0, "half_width": None, "values": [1.0]}
    assert interval([]) == {}


def test_intervals_of_many_comparisons_are_wider_and_hold_together() -> None:
    """Ten differences to one baseline, all of them zero: one by one a third of the tables show a false one, corrected
    at most a twentieth (and what chance adds to 2000 tables)."""
    assert interval([1.0, 2.0, 3.0], 10)["half_width"] == pytest.approx(14.08905 / 3**0.5, rel=1e-5)
    draw, false, tables = random.Random(0), {1: 0, 10: 0}, 2000
    half = {m: quantile(1 - 0.05 / (2 * m), 4) / 5**0.5 for m in false}
    for _ in range(tables):
        baseline = [draw.gauss(0, 1) for _ in range(5)]
        most = 0.0
        for _ in range(10):
            values = [draw.gauss(0, 1) - b for b in baseline]
            mean = sum(values) / 5
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
            most = max(most, abs(mean) / deviation)
        for m in false:
            false[m] += most > half[m]
    assert false[1] / tables > 0.25
    assert false[10] / tables < 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)
