"""Second moments of inputs: the formulas in float64, what half precision must not cost, and thin sketches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.calibration import STATISTICS
from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.moments import CordaMoment, ExactMoment, MomentSketch, SecondMoment
from lorafa.errors import CalibrationError
from lorafa.numerics.linalg import add_gram, damped_until_invertible, mirror_, nystrom
from lorafa.settings.methods import CordaConfig

IN = 12


def layer(rank: int = 2, in_: int = IN, settings: Any = None) -> Measured:
    return Measured("layers.0.q_proj", out=8, in_=in_, rank=rank, settings=settings)


def after(statistic: Statistic, *batches: Tensor) -> dict[str, Tensor]:
    statistic.start_pass(0, {})
    for x in batches:
        statistic.update(x, None)
    statistic.end_pass(0, (len(batches), 0))
    assert not statistic.wants_pass(1)
    return statistic.result()


def tokens(count: int = 40, in_: int = IN, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(count, in_, dtype=torch.float64) * torch.linspace(2, 0.1, in_)).to(dtype)


def decaying(in_: int, power: float) -> tuple[Tensor, Tensor]:
    """A positive semidefinite matrix with eigenvalues i^-power, and these."""
    Q, values = (
        torch.linalg.qr(torch.randn(in_, in_, dtype=torch.float64)).Q,
        torch.arange(1, in_ + 1).double() ** -power,
    )
    return Q * values @ Q.mT, values


@pytest.mark.parametrize("statistic", [SecondMoment, ExactMoment, CordaMoment, MomentSketch])
def test_padding_does_not_count_and_layers_with_the_same_input_share_one(statistic: type[Statistic]) -> None:
    made = statistic(layer())
    assert (made.tokens, made.shares_input, made.reads_gradient) == ("attended", True, False)


def test_they_are_found_by_name() -> None:
    assert STATISTICS.get("second_moment") is SecondMoment
    assert STATISTICS.get("exact_moment") is ExactMoment
    assert STATISTICS.get("corda_moment") is CordaMoment


def test_second_moment_is_the_mean_over_tokens_however_they_are_batched() -> None:
    x = tokens()
    for sizes in ([40], [1, 39], [13, 0, 13, 14]):
        found = after(SecondMoment(layer()), *x.split(sizes))
        torch.testing.assert_close(found["C"], x.mT @ x / 40, rtol=1e-13, atol=1e-13)
        assert found["tokens"] == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_costs_the_second_moment_nothing_beyond_the_rounding_of_the_inputs(dtype: torch.dtype) -> None:
    """One direction holds a millionth of the others' energy: a product rounded to bfloat16 (2^-9) would bury it."""
    scale = torch.full((IN,), 8.0, dtype=torch.float64)
    scale[3] = 8e-3
    x = (torch.randn(400, IN, dtype=torch.float64) * scale).to(dtype)
    exact = x.double().mT @ x.double() / len(x)
    C = after(SecondMoment(layer()), *x.chunk(3))["C"]
    assert C.dtype is torch.float32
    assert (C - exact).norm() < 2e-7 * exact.norm()
    assert torch.linalg.eigh(C).eigenvectors[3, 0].abs() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_exact_moment_is_that_of_float64_whatever_the_inputs(dtype: torch.dtype) -> None:
    """Also of a process that saw nothing, whose sums are added to those of the others."""
    x = (tokens(400) * torch.logspace(3, -3, IN, dtype=torch.float64)).to(dtype)
    exact = x.double().mT @ x.double() / len(x)
    torch.testing.assert_close(after(ExactMoment(layer()), *x.chunk(3))["C"], exact, rtol=1e-12, atol=0)
    assert ExactMoment(layer()).sums()[0].dtype is torch.float64


def test_squares_beyond_float16_do_not_overflow() -> None:
    x = torch.full((100, IN), 300.0, dtype=torch.float16)
    assert after(SecondMoment(layer()), x)["C"].eq(9e4).all()


@pytest.mark.parametrize("statistic", [SecondMoment, ExactMoment, CordaMoment, MomentSketch])
def test_a_layer_that_saw_nothing_is_named(statistic: type[Statistic]) -> None:
    text = r"No input reached 'layers.0.q_proj' in calibration.*Use batches that pass through .* exclude_modules"
    for batches in ([], [torch.zeros(0, IN)]):
        with pytest.raises(CalibrationError, match=text):
            after(statistic(layer()), *batches)


def test_corda_moment_is_the_mean_over_batches_each_scaled_by_its_largest_entry() -> None:
    """CorDA (2406.05223), the authors' code; their |max X| is max |X| where the largest entry is positive."""
    batches = [tokens(7), -tokens(9), 1000 * tokens(5)]
    found = after(CordaMoment(layer()), *batches)
    scaled = [x / x.abs().max() for x in batches]
    torch.testing.assert_close(found["C"], sum(x.mT @ x for x in scaled) / 3, rtol=1e-12, atol=1e-13)
    assert (found["batches"], found["tokens"]) == (3, 21)


def test_a_batch_of_zeros_or_without_tokens_says_nothing() -> None:
    x = tokens(7)
    assert torch.equal(
        after(CordaMoment(layer()), x, torch.zeros(3, IN).double(), x[:0])["C"], after(CordaMoment(layer()), x)["C"]
    )


def test_corda_moment_in_float16_takes_half_the_memory_and_is_as_precise_as_that() -> None:
    batches = [tokens(50, dtype=torch.float32) for _ in range(20)]
    half = CordaMoment(layer(settings=CordaConfig(use_float16_for_covariance=True)))
    C, exact = after(half, *batches)["C"], after(CordaMoment(layer(settings=CordaConfig())), *batches)["C"]
    assert half.mean is not None
    assert half.mean.dtype is torch.float16
    assert C.dtype is torch.float32
    assert 1e-6 < (C - exact).norm() / exact.norm() < 2e-3


@pytest.mark.parametrize(("rank", "of_data"), [(2, 1), (2, 5), (2, 8), (3, 12)])
def test_sketched_moment_of_a_rank_up_to_four_r_is_exact(rank: int, of_data: int) -> None:
    x = torch.randn(60, of_data, dtype=torch.float64) @ torch.randn(of_data, IN, dtype=torch.float64)
    found = after(MomentSketch(layer(rank)), *x.split(17))
    vectors, values = found["vectors"], found["values"]
    assert vectors.shape == (IN, 4 * rank)
    torch.testing.assert_close(vectors * values @ vectors.mT, x.mT @ x / 60, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(4 * rank).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found["trace"], x.square().sum() / 60, rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_what_a_sketch_misses_is_bounded_by_the_tail_of_the_spectrum(power: float) -> None:
    """Tropp et al. 2017 (1706.05736) theorem 4.1: on average below (1 + r / (k - r - 1)) times the tail after r."""
    in_, k, trials = 60, 16, 30
    C, exact = decaying(in_, power)
    missed = []
    for _ in range(trials):
        Omega = torch.randn(in_, k, dtype=torch.float64)
        values, vectors = nystrom(C @ Omega, Omega)
        rest = torch.linalg.eigvalsh(C - vectors * values @ vectors.mT)
        assert rest[0] > -1e-12  # never above C
        missed.append(rest.sum())
    bound = min((1 + r / (k - r - 1)) * exact[r:].sum() for r in range(k - 1))
    assert exact[k:].sum() <= torch.stack(missed).mean() < 1.05 * bound


def test_sketch_in_float32_is_exact_to_float32() -> None:
    x = (torch.randn(80, 5) @ torch.randn(5, IN)).bfloat16()
    found = after(MomentSketch(layer(2)), x)
    C = x.double().mT @ x.double() / 80
    values, vectors = torch.linalg.eigh(C)
    wanted = (vectors[:, -8:] * values[-8:] @ vectors[:, -8:].mT).float()
    assert (found["vectors"] * found["values"] @ found["vectors"].mT - wanted).norm() < 1e-5 * C.norm()


@pytest.mark.parametrize("statistic", [SecondMoment, ExactMoment, MomentSketch])
def test_ranks_add_up(statistic: type[SecondMoment]) -> None:
    x, parts = tokens(), []
    for share in x.split([10, 30]):
        parts.append(statistic(layer()))
        parts[-1].update(share, None)
    for one, other in zip(parts[0].sums(), parts[1].sums(), strict=True):
        one += other
    whole = after(statistic(layer()), x)
    for key, value in parts[0].result().items():
        torch.testing.assert_close(value, whole[key], rtol=1e-9, atol=1e-9)


def test_damping_is_one_percent_where_that_is_enough() -> None:
    C, _ = decaying(IN, 1)
    damped, L = damped_until_invertible(C, 0.01, 0.05)
    torch.testing.assert_close(damped, C + 0.01 * C.diagonal().mean() * torch.eye(IN).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(L @ L.mT, damped, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("large", "doublings"), [(1e3, range(3, 20)), (1.0, range(1))])
def test_damping_doubles_until_the_inverse_is_good(large: float, doublings: range) -> None:
    """An error of 1e-6 is beyond float32 (6e-8) at condition numbers of 1e6, and within it at those of a few."""
    x = torch.randn(100, IN) * torch.tensor([large] + [1.0] * (IN - 1))
    C = x.mT @ x if large > 1 else torch.eye(IN)
    damped, L = damped_until_invertible(C, 1e-5, 1e-6)
    assert torch.linalg.matrix_norm(damped @ torch.cholesky_inverse(L) - torch.eye(IN)) < 3e-6  # the norm is estimated
    found = float(((damped - C).diagonal().mean() / C.diagonal().mean() / 1e-5).log2())
    assert round(found) in doublings
    assert found == pytest.approx(round(found), abs=0.2)


def test_damping_makes_an_indefinite_matrix_invertible() -> None:
    """A moment kept in float16 can have small negative eigenvalues."""
    C = torch.diag(torch.tensor([5.0, 1.0, -0.5]))
    damped, L = damped_until_invertible(C, 0.01, 0.05)
    assert torch.linalg.eigvalsh(damped).min() > 0
    assert (damped @ torch.cholesky_inverse(L) - torch.eye(3)).norm() < 0.05


@pytest.mark.parametrize("in_", [1, 5, 128, 129, 270])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_half_the_products_make_the_whole_gram_matrix(in_: int, rows: int) -> None:
    total, x = torch.randn(in_, in_, dtype=torch.float64), torch.randn(rows, in_, dtype=torch.float64)
    total = total + total.mT
    expected = 0.25 * total + 3 * x.mT @ x
    add_gram(total, x, beta=0.25, alpha=3)
    torch.testing.assert_close(mirror_(total), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(total, total.mT)
