"""Incremental PCA: exact where it can be, settled when it says so, and one value on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.calibration import STATISTICS
from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.principal import MOST_PASSES, IncrementalPCA, PCASettings, Scatter, merged
from lorafa.errors import CalibrationError
from lorafa.numerics.linalg import leading_right
from lorafa.settings.methods import EvaConfig
from toys.calibration import tokens

IN = 20


def pca(rank: int = 3, in_: int = IN, **settings: Any) -> IncrementalPCA:
    return IncrementalPCA(Measured("layers.0.q_proj", 8, in_, rank, PCASettings(**settings)))


def run(statistic: Statistic, batches: list[Tensor], passes: int = 1) -> dict[str, Tensor]:
    for number in range(passes):
        statistic.start_pass(number, {})
        for x in batches:
            statistic.update(x, None)
        statistic.end_pass(number, (len(batches), 0))
    return statistic.result()


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and directions of centred tokens."""
    _, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return S, Vh


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Of the principal angles between two row spaces."""
    return torch.linalg.svdvals(one @ other.mT)


def test_it_is_found_by_name_and_has_the_defaults_of_eva() -> None:
    assert STATISTICS.get("principal") is IncrementalPCA
    for settings in (None, EvaConfig()):
        made = IncrementalPCA(Measured("x", 8, IN, 3, settings))
        assert made.settings == PCASettings()
        assert (made.k, made.tokens, made.shares_input, made.reads_gradient) == (6, "labelled", True, False)


def test_settings_are_those_of_the_config() -> None:
    made = IncrementalPCA(Measured("x", 8, IN, 3, EvaConfig(rho=1.5, tau=0.9, use_label_mask=False)))
    assert (made.k, made.settings.tau, made.tokens) == (4, 0.9, "attended")


def test_it_asks_for_no_more_directions_than_there_are() -> None:
    assert pca(rank=15).k == IN


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", [[200], [50] * 4, [7, 193], [3, 3, 94, 100]])
def test_with_as_many_components_as_dimensions_it_is_the_pca_of_all_tokens(sizes: list[int], center: bool) -> None:
    x = tokens()
    found = run(pca(rank=10, center=center), list(x.split(sizes)))
    shifted = x - x.mean(0) * center
    _, S, Vh = torch.linalg.svd(shifted, full_matrices=False)
    torch.testing.assert_close(found["singular_values"], S, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["total_variance"], shifted.square().sum(), rtol=1e-10, atol=0)
    assert (found["components"] * Vh).sum(1).abs().min() > 1 - 1e-9
    assert found["tokens"] == 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rank", "sizes"), [(10, [200]), (10, [50] * 4), (3, [200])], ids=str)
def test_inputs_in_half_precision_lose_nothing_beyond_their_own_rounding(
    dtype: torch.dtype, rank: int, sizes: list[int]
) -> None:
    """Against the PCA in float64 of the rounded inputs: what is left is float32's rounding of sums of 200 products."""
    x = (tokens() * 5 + 3).to(dtype)
    found = run(pca(rank=rank, tau=1.0), list(x.split(sizes)))
    k = min(2 * rank, IN)
    S, Vh = exact(x.double())
    assert {value.dtype for key, value in found.items() if key in ("components", "singular_values")} == {torch.float32}
    torch.testing.assert_close(found["singular_values"].double(), S[:k], rtol=0, atol=2e-6 * float(S[0]))
    torch.testing.assert_close(found["total_variance"].double(), S.square().sum(), rtol=1e-5, atol=0)
    gaps = S[: k - 1] - S[1:k]
    turned = 1 - (found["components"].double() * Vh[:k]).sum(1).abs()
    assert (turned[: k - 1] < (1e-5 * S[0] / gaps).square() + 1e-6).all()
    torch.testing.assert_close(cosines(found["components"].double(), Vh[:k]), torch.ones(k).double(), rtol=0, atol=1e-6)


def test_data_of_a_low_rank_are_recovered_exactly_and_have_no_directions_beyond_it() -> None:
    x = tokens(rank=4)
    found = run(pca(rank=3, tau=1.0), list(x.split(40)))
    S, Vh = exact(x)
    torch.testing.assert_close(found["singular_values"][:4], S[:4], rtol=1e-10, atol=0)
    assert cosines(found["components"][:4], Vh[:4]).min() > 1 - 1e-12
    assert not found["components"][4:].any()
    assert not found["singular_values"][4:].any()


def test_an_update_is_the_svd_of_components_batch_and_mean_correction() -> None:
    """EVA (2410.07170), after Ross et al. 2008: [diag(S) V; X - mean(X); sqrt(N n / (N + n)) (mean - mean(X))]."""
    first, second = tokens(30), tokens(50) + 1
    S, Vh = exact(first)
    gap = (30 * 50 / 80) ** 0.5 * (first.mean(0) - second.mean(0))
    stack = torch.cat([S[:6, None] * Vh[:6], second - second.mean(0), gap[None]])
    found = run(pca(rank=3), [first, second])
    wanted = torch.linalg.svd(stack)
    torch.testing.assert_close(found["singular_values"], wanted.S[:6], rtol=1e-12, atol=0)
    assert (found["components"] * wanted.Vh[:6]).sum(1).abs().min() > 1 - 1e-12
    x = torch.cat([first, second])
    torch.testing.assert_close(found["total_variance"], (x - x.mean(0)).square().sum(), rtol=1e-12, atol=0)


def test_explained_variance_ratios_sum_to_one_where_nothing_was_cut_off() -> None:
    found = run(pca(rank=10), list(tokens().split(50)))
    torch.testing.assert_close((found["singular_values"].square() / found["total_variance"]).sum().item(), 1.0)


@pytest.mark.parametrize("in_", [IN, 400], ids=["exact", "subspace iteration"])
def test_the_order_of_batches_does_not_matter(in_: int) -> None:
    """As long as none is passed over because the layer had converged: hence tau = 1."""
    x = tokens(1200, in_)
    batches = list(x.split(150))
    one, other = run(pca(in_=in_, tau=1.0), batches), run(pca(in_=in_, tau=1.0), batches[::-1])
    sines = (1 - cosines(one["components"][:3], other["components"][:3]).square()).clamp(min=0).sqrt()
    assert sines.max() < 1e-2
    _, Vh = exact(x)
    assert cosines(one["components"][:3], Vh[:3]).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)], ids=["wide", "tall"])
def test_subspace_iteration_finds_the_leading_directions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = tokens(*shape, power=1.5).to(dtype)
    start = torch.randn(shape[1], 16, dtype=dtype)
    S, Vh = leading_right(M, 8, start, 4)
    wanted = torch.linalg.svd(M)
    torch.testing.assert_close(S, wanted.S[:8], rtol=1e-4, atol=0)
    assert cosines(Vh, wanted.Vh[:8]).min() > 0.9999
    assert S.dtype is dtype
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(8, dtype=dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)], ids=["wide", "tall"])
def test_small_singular_values_keep_the_digits_of_float32(shape: tuple[int, int]) -> None:
    """Squaring a float32 matrix would lose everything below 3e-4 of the largest."""
    U = torch.linalg.qr(torch.randn(shape[0], 10, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(shape[1], 10, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -4, 10, dtype=torch.float64)
    S, Vh = leading_right((U * sigma @ V.mT).float(), 10)
    torch.testing.assert_close(S.double(), sigma, rtol=2e-3, atol=0)
    assert (Vh.double() @ V).diagonal().abs().min() > 0.999


def test_zeros_have_no_directions() -> None:
    for shape in ((5, 30), (30, 5), (400, 400)):
        S, Vh = leading_right(torch.zeros(shape), 4, torch.randn(shape[1], 8), 2)
        assert S.shape == (4,)
        assert Vh.shape == (4, shape[1])
        assert not S.any()
        assert not Vh.any()


def test_batches_of_fewer_tokens_than_components_wait_and_none_is_lost() -> None:
    x = tokens(100)
    small, found = pca(rank=5), pca(rank=5)
    result = run(small, list(x.split(4)))
    run(found, list(x.split(12)))  # 3 times 4 tokens are the first to be 10 or more
    assert torch.equal(result["components"], found.result()["components"])
    assert result["tokens"] == 100
    few = run(pca(rank=5), [x[:4]])
    assert few["tokens"] == 4
    assert few["singular_values"].gt(0).sum() == 3  # four tokens around their mean


def test_waiting_tokens_are_copies() -> None:
    x, buffer, statistic = tokens(8), torch.empty(4, IN, dtype=torch.float64), pca(rank=3)
    for part in x.split(4):
        buffer.copy_(part)
        statistic.update(buffer, None)
    torch.testing.assert_close(statistic.result()["singular_values"], exact(x)[0][:6], rtol=1e-12, atol=1e-12)


def test_a_component_has_converged_when_an_update_leaves_it_in_place() -> None:
    x, statistic = tokens(300, power=2), pca(rank=2)
    statistic.update(x, None)
    assert not statistic.satisfied
    statistic.update(x, None)  # the same tokens again
    assert statistic.converged.all()
    assert statistic.satisfied
    before = statistic.result()
    statistic.update(10 * tokens(300), None)
    assert all(torch.equal(value, before[key]) for key, value in statistic.result().items())


def test_convergence_is_a_cosine_of_tau_component_by_component() -> None:
    """Equal energy along two axes, then more along a diagonal: the first two turn by 45 degrees, the third stays."""
    first = torch.diag(torch.tensor([10.0, 9.9, 3.0, 1.0])).repeat(2, 1)
    first[4:] *= -1
    turned = first.clone()
    turned[:, :2] = turned[:, :2] @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) * 20
    statistic = pca(rank=2, in_=4, tau=0.99)
    statistic.update(first, None)
    statistic.update(turned, None)
    assert statistic.converged.tolist() == [False, False, True, True]
    statistic.needed = 0
    assert statistic.satisfied


def test_only_the_components_that_are_needed_must_converge() -> None:
    x = torch.randn(400, IN) * torch.tensor([20.0, 10.0, *[1.0] * (IN - 2)])
    statistic = pca(rank=5)
    for batch in x.split(40):
        statistic.update(batch, None)
    assert not statistic.satisfied
    statistic.needed = 2
    assert statistic.satisfied


def test_layers_wait_for_the_components_they_would_get_if_ranks_were_shared_out() -> None:
    """One layer's variance is in one direction, the other's in many; the first also serves a third layer."""
    measured = [Measured(name, 8, IN, 2, PCASettings()) for name in ("steep", "flat", "like steep")]
    steep, flat = IncrementalPCA(measured[0]), IncrementalPCA(measured[1])
    layers = [(measured[0], steep), (measured[1], flat), (measured[2], steep)]
    steep.update(torch.randn(400, IN) * torch.tensor([10.0, *[0.1] * (IN - 1)]), None)
    IncrementalPCA.compare(layers)
    assert (steep.needed, flat.needed) == (4, 4)  # nothing is known of the second yet
    flat.update(torch.randn(400, IN) * torch.tensor([*[10.0] * 4, *[0.1] * (IN - 4)]), None)
    IncrementalPCA.compare(layers)
    assert (steep.needed, flat.needed) == (1, 4)  # six ranks: one each for the steep ones, four for the flat one
    assert flat.explained_variance.sum() == pytest.approx(1, abs=0.01)


def test_data_are_gone_round_again_until_it_settles_but_not_for_ever() -> None:
    statistic, batches = pca(rank=3, tau=0.99), list(tokens(60).split(15))
    run(statistic, batches[:2])
    assert statistic.wants_pass(1)
    assert not statistic.wants_pass(MOST_PASSES)
    number = 1
    while statistic.wants_pass(number):
        for x in batches:
            statistic.update(x, None)
        number += 1
    assert statistic.satisfied
    assert 1 < number < MOST_PASSES
    never = pca()
    assert never.wants_pass(0)
    assert not never.wants_pass(1)


def test_tokens_that_are_not_finite_make_a_result_that_is_not() -> None:
    x = tokens(50)
    x[3, 4] = torch.nan
    statistic = pca()
    found = run(statistic, [tokens(50), x, tokens(50)])
    assert found["components"].isnan().all()
    assert found["singular_values"].isnan().all()
    assert not statistic.explained_variance.any()
    assert statistic.satisfied


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, IN)]])
def test_a_layer_that_saw_nothing_is_named(batches: list[Tensor]) -> None:
    with pytest.raises(CalibrationError, match=r"No input reached 'layers.0.q_proj' in calibration"):
        run(pca(), batches)


def test_halves_merge_to_the_whole() -> None:
    x = tokens(120, rank=6) + 3
    halves = [Scatter.of(part).truncated(6) for part in (x[:50], x[50:])]
    S, Vh = exact(x)
    for order in (halves, halves[::-1]):
        both = merged(order, 6)
        torch.testing.assert_close(both.singular_values, S[:6], rtol=1e-10, atol=0)
        assert cosines(both.directions, Vh[:6]).min() > 1 - 1e-12
        torch.testing.assert_close(both.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.total, (x - x.mean(0)).square().sum(), rtol=1e-12, atol=0)
        assert both.count == 120


def test_equal_shares_of_what_is_known_merge_to_what_is_known() -> None:
    known = Scatter.of(tokens(50)).truncated(6)
    again = merged([known.times(1 / 3)] * 3, 6)
    torch.testing.assert_close(again.rows, known.rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again.total, known.total, rtol=1e-12, atol=0)
    assert again.count == pytest.approx(50)
