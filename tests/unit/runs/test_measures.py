"""What is read of a run's metrics: curves, steps to a loss, seconds a step."""

from __future__ import annotations

import math

import pytest

from lorafa.runs.measures import curve, mean_curve, spread, step_seconds, steps_to, steps_to_baseline


def test_a_curve_has_the_finite_values_of_its_name_one_a_step() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 2, "eval_loss": 1.0}]
    rows.append({"step": 1, "loss": 3})
    assert curve(rows, "loss") == [(1.0, 3.0)]
    assert curve(rows, "eval_loss") == [(2.0, 1.0)]


def test_the_mean_of_curves_ends_where_the_first_of_them_does() -> None:
    assert mean_curve([[(1, 1.0), (2, 2.0)], [(1, 3.0)]]) == [(1, [1.0, 3.0])]
    assert mean_curve([]) == []


def test_the_step_a_loss_is_reached_at_lies_between_two_measurements() -> None:
    points = [(10.0, 3.0), (30.0, 1.0)]
    assert steps_to(points, 2.0) == pytest.approx(20.0)
    assert steps_to(points, 5.0) == 10.0
    assert steps_to(points, 0.5) is None


def test_the_baseline_reaches_its_own_last_loss_at_its_last_step() -> None:
    """Also where one of its seeds ends above the mean of all, which never reaches that."""
    baseline = [[(10.0, 3.0), (20.0, 2.0)], [(10.0, 2.0), (20.0, 1.0)]]
    assert steps_to_baseline(baseline, baseline) == pytest.approx(20.0)
    faster = [[(10.0, 2.0), (20.0, 1.0)], [(10.0, 2.0), (20.0, 1.0)]]
    assert steps_to_baseline(faster, baseline) == pytest.approx(15.0)
    assert steps_to_baseline([[(10.0, 3.0), (20.0, 2.0)]], baseline) is None
    assert steps_to_baseline(faster, []) is None


def test_seconds_a_step_leave_out_what_is_measured_on_the_way_and_what_is_made_once() -> None:
    rows = [
        {"step": 1, "loss": 1.0, "seconds": 50.0}, {"step": 2, "loss": 1.0, "seconds": 52.0},
        {"step": 2, "eval_loss": 1.0, "seconds": 90.0}, {"step": 4, "loss": 1.0, "seconds": 96.0},
    ]  # fmt: skip
    assert step_seconds(rows) == [2.0, 3.0]


def test_a_spread_is_the_median_with_a_tenth_below_and_above() -> None:
    assert spread([float(number) for number in range(11)]) == {"median": 5.0, "low": 1.0, "high": 9.0}
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert spread([]) is None
