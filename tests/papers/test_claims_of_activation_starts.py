"""Starts from a layer's inputs, EVA, CorDA and LoRA-Null: each property as its paper states it, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import CordaConfig, EvaConfig
from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.moments import CordaMoment, ExactMoment, SecondMoment
from lorafa.calibration.principal import IncrementalPCA
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult
from lorafa.numerics.linalg import full_svd
from lorafa.spec import LayerSpec
from toys.compare import close
from toys.data import rand

OUT, IN, R, S = 24, 32, 4, 1.7
STATISTICS: dict[str, type[Statistic]] = {
    "principal": IncrementalPCA,
    "corda_moment": CordaMoment,
    "exact_moment": ExactMoment,
}
METHODS = ("ipm", "kpm")


W = rand(OUT, IN, seed=1)
X = rand(200, IN, seed=2) * torch.logspace(0.5, -1.5, IN, dtype=torch.float64) @ torch.linalg.qr(rand(IN, IN, seed=3)).Q


def stats_of(x: Tensor, *, rank: int = R) -> dict[str, Tensor]:
    """All statistics of one batch of inputs."""
    tensors = {}
    for name, kind in STATISTICS.items():
        statistic = kind(Measured("layers.0.q_proj", OUT, x.shape[1], rank))
        statistic.update(x, None)
        statistic.end_pass(0, (1, 0))
        tensors |= {f"{name}.{key}": value for key, value in statistic.result().items()}
    return tensors


def start(
    name: str, settings: Any = None, stats: dict[str, Tensor] | None = None, weight: Tensor = W, **spec: Any
) -> InitResult:
    values = {"name": "layers.0.q_proj", "kind": "linear", "rank": R, "scaling": S, "seed": 0, "settings": settings}
    return INITIALIZERS.get(name)(weight, stats_of(X) if stats is None else stats, LayerSpec(**(values | spec)))  # type: ignore[arg-type]


# EVA


def test_eva_A_has_orthonormal_rows_along_the_principal_directions_and_B_is_zero() -> None:
    result = start("eva", EvaConfig())
    _, _, Vh = torch.linalg.svd(X - X.mean(0))
    close(result.A @ result.A.mT, torch.eye(R).double())
    close(torch.linalg.svdvals(result.A @ Vh[:R].mT), torch.ones(R).double())
    assert not result.B.any()
    assert result.B.shape == (OUT, R)
    assert not result.subtract_from_base


def test_eva_keeps_more_of_the_variance_than_any_other_projection_on_r_directions() -> None:
    centred = X - X.mean(0)
    kept = (centred @ start("eva").A.mT).square().sum()
    close(kept, torch.linalg.svdvals(centred)[:R].square().sum())
    for seed in range(20):
        other = torch.linalg.qr(rand(IN, R, seed=seed)).Q
        assert (centred @ other).square().sum() < kept


def test_eva_whitened_divides_each_row_by_the_root_of_its_singular_value() -> None:
    plain, whitened = start("eva", EvaConfig()).A, start("eva", EvaConfig(whiten=True)).A
    sigma = torch.linalg.svdvals(X - X.mean(0))[:R]
    close(whitened, plain / sigma.sqrt()[:, None])


def test_eva_of_a_smaller_rank_is_the_first_rows_of_a_larger_one() -> None:
    stats = stats_of(X)
    assert torch.equal(start("eva", stats=stats, rank=2).A, start("eva", stats=stats).A[:2])


def test_eva_leaves_the_statistics_alone() -> None:
    stats = stats_of(X)
    before = stats["principal.components"].clone()
    start("eva", stats=stats).A.zero_()
    assert torch.equal(stats["principal.components"], before)


def test_eva_needs_as_many_directions_as_its_rank() -> None:
    text = "q_proj: the statistics hold 8 directions of input, and r = 9 takes 9 here. Collect them with a config of"
    with pytest.raises(CalibrationError, match=text):
        start("eva", stats=stats_of(X), rank=9)


# CorDA


def damped() -> Tensor:
    C = stats_of(X)["corda_moment.C"]
    return C + 0.01 * C.diagonal().mean() * torch.eye(IN).double()


def test_corda_ipm_leaves_the_least_a_matrix_of_rank_r_can_in_the_metric_of_the_data() -> None:
    """||(W - s B A) C|| is the tail of the singular values of W C, and no other rank-r matrix does better."""
    result, C = start("corda", CordaConfig(corda_method="ipm")), damped()
    sigma = torch.linalg.svdvals(W @ C)
    left = torch.linalg.matrix_norm((W - S * result.B @ result.A) @ C)
    close(left, sigma[R:].square().sum().sqrt())
    for seed in range(20):
        nudge = 0.01 * (rand(OUT, R, seed=seed) @ result.A + result.B @ rand(R, IN, seed=seed + 50))
        assert torch.linalg.matrix_norm((W - S * result.B @ result.A - nudge) @ C) > left
    assert result.subtract_from_base


def test_corda_kpm_leaves_all_but_the_smallest_singular_values() -> None:
    result, C = start("corda", CordaConfig(corda_method="kpm")), damped()
    sigma = torch.linalg.svdvals(W @ C)
    left = (W - S * result.B @ result.A) @ C
    close(left.square().sum(), sigma[:-R].square().sum())
    close(torch.linalg.svdvals(left)[: OUT - R], sigma[:-R])


@pytest.mark.parametrize("method", METHODS)
def test_corda_shares_the_triplets_evenly_between_the_factors(method: str) -> None:
    """B^T B = A C^2 A^T = diag(sigma / s)."""
    result, C = start("corda", CordaConfig(corda_method=method)), damped()
    sigma = torch.linalg.svdvals(W @ C)
    wanted = torch.diag((sigma[:R] if method == "ipm" else sigma[-R:]) / S)
    close(result.B.mT @ result.B, wanted)
    close(result.A @ C @ C @ result.A.mT, wanted, 1e-8)


@pytest.mark.parametrize(("method", "other"), [("ipm", "pissa"), ("kpm", "milora")])
def test_corda_of_white_inputs_is_a_start_from_the_weight_alone(method: str, other: str) -> None:
    stats = {"corda_moment.C": torch.eye(IN).double()}
    white, plain = start("corda", CordaConfig(corda_method=method), stats), start(other)
    close(white.B @ white.A, plain.B @ plain.A, 1e-9)


def test_corda_does_not_depend_on_the_scale_of_the_inputs() -> None:
    one, other = start("corda", stats=stats_of(X)), start("corda", stats=stats_of(1000 * X))
    close(other.B, one.B)
    close(other.A, one.A)


def test_corda_is_found_in_float32_too() -> None:
    C = stats_of(X)["corda_moment.C"].float()
    for method in METHODS:
        settings = CordaConfig(corda_method=method)
        small, exact = start("corda", settings, {"corda_moment.C": C}, W.float()), start("corda", settings)
        assert small.A.dtype is torch.float32
        torch.testing.assert_close((small.B @ small.A).double(), exact.B @ exact.A, rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_sees_the_other_inputs_beside_one_that_is_far_larger(method: str) -> None:
    """As some models have it: the rest of W C is below the rounding of float32 then, though not of C's own entries."""
    C = stats_of(X * torch.tensor([1e5] + [1.0] * (X.shape[-1] - 1)).double())["corda_moment.C"].float()
    settings = CordaConfig(corda_method=method)
    small = start("corda", settings, {"corda_moment.C": C}, W.float())
    exact = start("corda", settings, {"corda_moment.C": C.double()}, W.float().double())
    torch.testing.assert_close(small.B.double() @ small.A.double(), exact.B @ exact.A, rtol=0, atol=1e-4)


def test_corda_moment_that_overflowed_in_float16_is_degenerate() -> None:
    settings = CordaConfig(use_float16_for_covariance=True)
    statistic = CordaMoment(Measured("x", OUT, IN, R, settings))
    statistic.update(torch.ones(70_000, IN), None)
    with pytest.raises(DegenerateError, match=r"^the second moment of its input is not finite"):
        start("corda", settings, {"corda_moment.C": statistic.result()["C"]})


# LoRA-Null


def test_lora_null_takes_the_weight_along_the_directions_the_data_use_least() -> None:
    result = start("lora_null")
    Q = torch.linalg.eigh(X.mT @ X).eigenvectors[:, :R]
    close(S * result.B @ result.A, W @ Q @ Q.mT, 1e-8)
    sigma = torch.linalg.svdvals(W @ Q)
    close(result.B.mT @ result.B, torch.diag(sigma / S), 1e-8)
    close(result.A @ result.A.mT, torch.diag(sigma / S), 1e-8)
    assert result.subtract_from_base


def test_lora_null_A_sees_only_the_smallest_energies_of_the_data() -> None:
    """For the orthonormal rows Q^T of A's span ||Q^T X^T||^2 is the sum of the r smallest eigenvalues of X^T X."""
    A = start("lora_null").A
    Q = torch.linalg.qr(A.mT).Q
    close((X @ Q).square().sum(), torch.linalg.eigvalsh(X.mT @ X)[:R].sum(), 1e-8)
    assert (X @ Q).square().sum() < 1e-3 * X.square().sum()


def test_lora_null_changes_nothing_on_data_that_leave_r_directions_free() -> None:
    """Whatever B becomes, with A frozen (LoRA-Null v2): A x = 0."""
    x = X.clone()
    x -= x @ (basis := torch.linalg.qr(rand(IN, R, seed=9)).Q) @ basis.mT
    result = start("lora_null", stats=stats_of(x))
    assert (x @ result.A.mT).abs().max() < 1e-7
    close(torch.linalg.svdvals(torch.linalg.qr(result.A.mT).Q.mT @ basis), torch.ones(R).double(), 1e-7)


@pytest.mark.parametrize("largest", [1e3, 1e4])
def test_lora_null_finds_the_least_energies_beside_a_channel_that_dwarfs_them(largest: float) -> None:
    """In float32 an eigendecomposition rounds to 1e-7 of the largest eigenvalue, which hides the smallest."""
    spread = torch.logspace(0, -1.5, 128)
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)) * spread
    x[:, 1:] @= torch.linalg.qr(rand(127, 127, seed=5)).Q.float()
    x[:, 0] *= largest
    A = start("lora_null", stats=stats_of(x), weight=rand(96, 128, seed=6).float()).A.double()
    Q, x = torch.linalg.qr(A.mT).Q, x.double()
    close((x @ Q).square().sum(), torch.linalg.eigvalsh(x.mT @ x)[:R].sum(), 1e-2)


def energy_of_A(C: Tensor, x: Tensor) -> float:
    """||x Q^T||^2 for LoRA-Null's directions by C, in units of the least that r directions can have."""
    A = start("lora_null", stats={"exact_moment.C": C}, weight=rand(96, x.shape[1], seed=6).float()).A.double()
    held = (x.double() @ torch.linalg.qr(A.mT).Q).square().sum()
    return float(held / torch.linalg.eigvalsh(x.double().mT @ x.double())[:R].sum())


@pytest.mark.parametrize(("largest", "in_float32"), [(1e3, 3.0), (1e4, 50.0)])
def test_lora_null_finds_the_least_energies_beside_a_direction_that_dwarfs_them(
    largest: float, in_float32: float
) -> None:
    """Of no single channel, so that it is in every entry of C: a C of float32 leaves A 4 and 100 times the least."""
    scale = torch.logspace(0, -1.5, 128, dtype=torch.float64)
    scale[0] = largest
    x = (rand(4096, 128, seed=7) * scale @ torch.linalg.qr(rand(128, 128, seed=8)).Q.mT).float()
    found = {}
    for kind in (ExactMoment, SecondMoment):
        statistic = kind(Measured("layers.0.q_proj", OUT, 128, R))
        for batch in x.split(256):
            statistic.update(batch, None)
        found[kind] = energy_of_A(statistic.result()["C"], x)
    assert found[ExactMoment] == pytest.approx(1, abs=1e-4)
    assert found[SecondMoment] > in_float32


# All of them


STARTS = ("eva", "corda", "lora_null")
POOR = {
    "eva": "^its input has {} singular values",
    "corda": "^its statistics are of {}",
    "lora_null": "^its statistics",
}


@pytest.mark.parametrize("name", STARTS)
def test_fewer_tokens_than_directions_are_degenerate(name: str) -> None:
    """Three tokens around their mean span two directions."""
    with pytest.raises(DegenerateError, match=POOR[name].format(2 if name == "eva" else "3 tokens, fewer than r = 4")):
        start(name, stats=stats_of(X[:3]))


@pytest.mark.parametrize("name", STARTS)
def test_inputs_that_are_not_finite_are_degenerate(name: str) -> None:
    x = X.clone()
    x[5, 5] = torch.inf
    with pytest.raises(DegenerateError, match="its input is not finite"):
        start(name, stats=stats_of(x))


def test_inputs_of_zeros_are_degenerate() -> None:
    zeros = torch.zeros(50, IN)
    with pytest.raises(DegenerateError, match=r"^its input has 0 singular values other than zero where 4 are needed"):
        start("eva", stats={f"principal.{k}": v for k, v in _principal(zeros).items()})
    for name, statistic in (("corda", "corda_moment"), ("lora_null", "exact_moment")):
        with pytest.raises(DegenerateError, match=r"^its input is zero"):
            start(name, stats={f"{statistic}.C": torch.zeros(IN, IN)})


def _principal(x: Tensor) -> dict[str, Tensor]:
    statistic = IncrementalPCA(Measured("x", OUT, IN, R))
    statistic.update(x, None)
    return statistic.result()


@pytest.mark.parametrize("name", ["corda", "lora_null"])
def test_a_weight_of_zeros_is_degenerate(name: str) -> None:
    with pytest.raises(
        DegenerateError, match=r"^its weight.* has 0 singular values other than zero where 4 are needed"
    ):
        start(name, weight=torch.zeros_like(W))


@pytest.mark.parametrize("name", STARTS)
def test_rank_beyond_the_layer_is_refused_before_anything_else(name: str) -> None:
    with pytest.raises(ConfigError, match=r"q_proj: rank 25 is larger than min\(out, in\) = 24"):
        start(name, stats=stats_of(X[:3]), rank=25)


@pytest.mark.parametrize("name", STARTS)
def test_statistics_of_a_half_precision_model_give_float32_factors(name: str) -> None:
    result = start(name, stats=stats_of(X.bfloat16()), weight=W.bfloat16())
    assert result.A.dtype is torch.float32
    assert result.B.dtype is torch.float32


def test_principal_directions_of_batches_are_those_of_the_whole_for_eva() -> None:
    """All cosines with the exact subspace are above 0.99: what an incremental PCA drops of early batches is small."""
    statistic = IncrementalPCA(Measured("x", OUT, IN, R))
    for batch in X.split(25):
        statistic.update(batch, None)
    A = start("eva", stats={f"principal.{key}": value for key, value in statistic.result().items()}).A
    exact = full_svd(X - X.mean(0)).Vh[:R]
    assert torch.linalg.svdvals(A @ exact.mT).min() > 0.99
