"""The weight of the teacher by the sizes of gradients."""

from __future__ import annotations

import pytest

from lorafa.alignment.balance import balanced_weight
from lorafa.errors import CalibrationError, ConfigError


def test_the_teachers_gradient_is_half_of_the_tasks_in_the_median_layer() -> None:
    weight = balanced_weight([1.0, 4.0, 100.0], [2.0, 0.5, 8.0])
    assert weight == pytest.approx(0.5 * 4.0 / 2.0)


def test_it_does_not_depend_on_the_unit_of_the_loss() -> None:
    task, align = [3.0, 5.0, 2.0], [1.0, 7.0, 4.0]
    once = balanced_weight(task, align)
    assert once == pytest.approx(balanced_weight([7 * one for one in task], [7 * one for one in align]))


def test_a_share_of_one_makes_both_gradients_equal() -> None:
    assert balanced_weight([6.0], [3.0], rho=1.0) == pytest.approx(2.0)


@pytest.mark.parametrize(("task", "align", "expected"), [(1.0, 1000.0, 0.05), (1000.0, 2.0, 20.0), (0.0, 1.0, 0.05)])
def test_it_stays_within_its_bounds(task: float, align: float, expected: float) -> None:
    assert balanced_weight([task], [align]) == expected


@pytest.mark.parametrize("align", [0.0, 1e-3])
def test_a_teacher_that_says_what_the_student_says_has_no_weight(align: float) -> None:
    assert balanced_weight([1.0], [align]) is None
    assert balanced_weight([0.0], [0.0]) is None
    assert balanced_weight([1.0], [1.1e-3]) == 20.0


def test_norms_of_other_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"norms of 2 layers for the task and of 1 for the teacher\. Pass both"):
        balanced_weight([1.0, 2.0], [1.0])
    with pytest.raises(ConfigError, match="norms of 0 layers"):
        balanced_weight([], [])
    with pytest.raises(ConfigError, match="rho must be a number above 0"):
        balanced_weight([1.0], [1.0], rho=0.0)


def test_a_norm_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match="of 1 of 2 layers are not finite for the teacher"):
        balanced_weight([1.0, 2.0], [float("nan"), 1.0])
