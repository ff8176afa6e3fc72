"""Starts from a teacher, LoRA-DA and the control of LoRAM: each property as its source states it, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.calibration.gradient import metric_inverse, metric_root, whitening
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult
from lorafa.initializers.from_teacher import FromTeacherConfig
from lorafa.initializers.lora_da import LoraDAConfig
from lorafa.initializers.lora_one import LoraOneConfig
from lorafa.initializers.loram import LoramConfig
from lorafa.numerics.linalg import full_svd
from lorafa.spec import LayerSpec
from toys.compare import best, close
from toys.data import rand

OUT, IN, R, S = 24, 32, 3, 1.7
W, G, D = rand(OUT, IN, seed=1), rand(OUT, IN, seed=2), rand(OUT, IN, seed=4)
X = rand(200, IN, seed=3) * torch.linspace(0.1, 3, IN, dtype=torch.float64)
C = X.mT @ X / len(X)
Y = rand(OUT, seed=5).square() + 0.1


def start(name: str, stats: dict[str, Tensor], settings: Any = None, **spec: Any) -> InitResult:
    values = {"name": "layers.0.q_proj", "kind": "linear", "rank": R, "scaling": S, "seed": 0, "settings": settings}
    return INITIALIZERS.get(name)(W, stats, LayerSpec(**(values | spec)))  # type: ignore[arg-type]


def of_change(change: Tensor, moment: Tensor = C) -> dict[str, Tensor]:
    found = full_svd(change @ metric_root(moment))
    return {f"teacher_change.{key}": value for key, value in found._asdict().items()} | {"second_moment.C": moment}


def of_gradient(gradient: Tensor = G, moment: Tensor = C, out: Tensor = Y, rows: int = 8) -> dict[str, Tensor]:
    tensors = {f"gradient.{key}": value for key, value in full_svd(gradient)._asdict().items()}
    moments = {"second_moment.C": moment, "output_moment.Y": out, "output_moment.rows": torch.tensor(rows)}
    return tensors | moments | {"gradient.dense": gradient}


# ---- from a teacher


@pytest.mark.parametrize("rank", [1, R])
def test_a_teacher_that_changes_no_more_directions_than_there_are_ranks_is_copied_exactly(rank: int) -> None:
    change = best(D, rank)
    result = start("from_teacher", of_change(change))
    close(S * result.B @ result.A, change, 1e-10)
    left_over = result.B.norm(dim=0) == 0
    assert int(left_over.sum()) == R - rank
    assert bool((result.A[left_over].norm(dim=1) > 0).all())  # or they would never train
    assert not result.subtract_from_base


def test_the_error_on_the_data_is_the_tail_and_plain_truncation_has_more() -> None:
    result, root = start("from_teacher", of_change(D)), metric_root(C)
    error = torch.linalg.matrix_norm((D - S * result.B @ result.A) @ root)
    close(error, full_svd(D @ root).S[R:].square().sum().sqrt(), 1e-10)
    assert torch.linalg.matrix_norm((D - best(D, R)) @ root) > 1.02 * error


def test_kappa_is_the_part_of_the_change_that_is_taken() -> None:
    whole, half = start("from_teacher", of_change(D)), start("from_teacher", of_change(D), FromTeacherConfig(kappa=0.5))
    close(half.B @ half.A, 0.5 * whole.B @ whole.A, 1e-12)


def test_the_left_half_keeps_the_function_and_spans_the_same_outputs() -> None:
    full, own = start("from_teacher", of_change(D)), FromTeacherConfig(part="left")
    left = start("from_teacher", of_change(D), own)
    triplets = full_svd(D @ metric_root(C))
    assert not left.A.any()
    close(left.B, triplets.U[:, :R] * triplets.S[:R].sqrt())
    close(torch.linalg.lstsq(left.B, full.B).solution.diagonal(), torch.full((R,), S**-0.5, dtype=torch.float64), 1e-10)
    few = start("from_teacher", of_change(best(D, 1)), own)
    assert not (few.B @ few.A).any()
    assert bool(((few.B.norm(dim=0) > 0) | (few.A.norm(dim=1) > 0)).all())


def test_a_teacher_of_the_same_weight_or_one_that_is_not_finite_is_nothing_to_start_from() -> None:
    nothing = of_change(D)
    nothing["teacher_change.S"] = torch.zeros_like(nothing["teacher_change.S"])
    with pytest.raises(DegenerateError, match="its teacher has the same weight"):
        start("from_teacher", nothing)
    with pytest.raises(DegenerateError, match="what its teacher changes is not finite"):
        start("from_teacher", of_change(D) | {"teacher_change.S": torch.full((OUT,), torch.nan)})
    few = of_change(D)
    few = {key: value[:2] if key.endswith("S") else value for key, value in few.items()}
    with pytest.raises(CalibrationError, match="hold 2 directions of the teacher's change, and r = 3"):
        start("from_teacher", few)
    with pytest.raises(ConfigError, match=r"part has no value 'right'\. Pass one of: 'full', 'left'"):
        FromTeacherConfig(part="right")
    with pytest.raises(ConfigError, match="kappa must be a number > 0"):
        FromTeacherConfig(kappa=0.0)


# ---- LoRA-DA


def natural_step(gradient: Tensor = G, moment: Tensor = C, out: Tensor = Y) -> Tensor:
    step = -gradient @ metric_inverse(moment) / (out + 0.01 * out.mean())[:, None]
    return step / torch.linalg.matrix_norm(step, 2)


def test_without_the_penalty_lora_da_is_the_best_copy_of_the_natural_step() -> None:
    result = start("lora_da", of_gradient(), LoraDAConfig(beta=0.0, stable_gamma=50.0))
    close(result.B @ result.A, best(natural_step(), R) / 50, 1e-10)
    V = full_svd(natural_step()).Vh[:R]
    close(result.A.mT @ result.A * 50, V.mT @ V, 1e-9)
    assert not result.subtract_from_base


def test_lora_da_takes_the_leading_eigenvectors_of_the_penalized_step() -> None:
    alpha, beta, rows = 0.7, 0.4, 8
    result = start("lora_da", of_gradient(rows=rows), LoraDAConfig(alpha=alpha, beta=beta))
    damped, inverse = Y + 0.01 * Y.mean(), metric_inverse(C)
    step = -G @ inverse / damped[:, None]
    omega = alpha * step.mT @ step - beta * (1 / damped).sum() / rows * inverse
    A = result.A * 1024**0.5
    close(A @ A.mT, torch.eye(R, dtype=torch.float64), 1e-10)
    values = torch.linalg.eigvalsh(omega)[-R:]
    close((A @ omega @ A.mT).trace(), values.sum(), 1e-9)
    close(result.B * 1024**0.5, natural_step() @ A.mT, 1e-9)


def test_with_equal_outputs_and_inputs_lora_das_rows_are_lora_ones_and_of_other_inputs_not_functionals() -> None:
    flat = of_gradient(moment=2.5 * torch.eye(IN, dtype=torch.float64), out=torch.ones(OUT, dtype=torch.float64))
    found = start("lora_da", flat, LoraDAConfig(beta=0.0))
    one = start("lora_one", of_gradient(), LoraOneConfig())
    assert overlap(found.A, one.A) == pytest.approx(1.0, abs=1e-10)
    general = start("lora_da", of_gradient(out=torch.ones(OUT, dtype=torch.float64)), LoraDAConfig(beta=0.0))
    white = {f"whitened_gradient.{key}": value for key, value in full_svd(G @ whitening(C))._asdict().items()}
    functional = start("functional", white | {"second_moment.C": C}, LoraOneConfig())
    assert overlap(general.A, functional.A) < 0.98
    assert overlap(general.A, one.A) < 0.5


def overlap(one: Tensor, other: Tensor) -> float:
    """||Q1^T Q2||^2 / r of the row spaces of two matrices."""
    Q1, Q2 = (torch.linalg.qr(each.mT).Q for each in (one, other))
    return float((Q1.mT @ Q2).square().sum() / Q1.shape[1])


@pytest.mark.parametrize(("scale_of_loss", "scale_of_inputs"), [(1e-4, 1.0), (1e3, 1.0), (1.0, 30.0)])
def test_lora_das_directions_do_not_depend_on_units(scale_of_loss: float, scale_of_inputs: float) -> None:
    plain = start("lora_da", of_gradient(), LoraDAConfig(beta=0.5))
    scaled = of_gradient(G * scale_of_loss * scale_of_inputs, C * scale_of_inputs**2, Y * scale_of_loss**2)
    found = start("lora_da", scaled, LoraDAConfig(beta=0.5))
    close(found.B @ found.A, plain.B @ plain.A, 1e-6)


def test_dividing_noise_by_many_rows_takes_the_penalty_away() -> None:
    without = start("lora_da", of_gradient(), LoraDAConfig(beta=0.0))
    sample, train = (start("lora_da", of_gradient(), LoraDAConfig(samples=n)) for n in ("sample", 100_000))
    assert overlap(train.A, without.A) > 0.9999
    assert overlap(sample.A, without.A) < overlap(train.A, without.A)
    same = start("lora_da", of_gradient(rows=5), LoraDAConfig(samples=8))
    close(same.A, sample.A)


OUTPUTS, TOKENS = rand(48, seed=2).square() + 0.2, 32
"""Of the toy: the diagonal moment of a token's output gradient, and the tokens of a row."""
_Q = torch.linalg.qr(rand(64, 64, seed=1)).Q
MOMENT = _Q * torch.logspace(0, -2, 64, dtype=torch.float64) @ _Q.mT
_PLANTED = rand(48, 4, seed=3) @ rand(4, 64, seed=4) @ metric_root(MOMENT)
POPULATION = 10 / _PLANTED.norm() * OUTPUTS[:, None] * _PLANTED @ MOMENT
"""A gradient whose natural step has rank 4."""


def caught(beta: float, rows: int) -> tuple[float, float]:
    """The share of the population's step that A catches, and the overlap of two samples' A, in the mean of samples."""
    step = POPULATION @ metric_inverse(MOMENT) / (OUTPUTS + 0.01 * OUTPUTS.mean())[:, None]
    found = []
    for seed in range(10, 18):
        noise = OUTPUTS.sqrt()[:, None] * rand(48, 64, seed=seed) @ metric_root(MOMENT) / (TOKENS * rows) ** 0.5
        stats = of_gradient(POPULATION + noise, MOMENT, OUTPUTS, rows)
        found.append(start("lora_da", stats, LoraDAConfig(beta=beta), rank=4).A)
    shares = [float((step @ torch.linalg.qr(A.mT).Q).square().sum() / step.square().sum()) for A in found]
    overlaps = [overlap(one, other) for one, other in zip(found[::2], found[1::2], strict=True)]
    return sum(shares) / len(shares), sum(overlaps) / len(overlaps)


def test_the_penalty_finds_more_of_the_population_in_a_small_sample() -> None:
    """The sheet's toy, 48 x 64: of eight rows A catches more, of many the penalty changes nothing, and a large one of
    eight takes directions for their small inputs alone."""
    plain, penalized = caught(0.0, 8), caught(0.03, 8)
    assert penalized[0] > plain[0] + 0.1, (plain, penalized)
    assert penalized[1] > plain[1] + 0.03, (plain, penalized)
    assert caught(0.03, 10_000) == pytest.approx(caught(0.0, 10_000), rel=1e-3)
    assert caught(3.0, 8)[0] < caught(0.1, 8)[0]


def test_what_lora_da_cannot_start_from() -> None:
    with pytest.raises(DegenerateError, match="its gradient is zero"):
        start("lora_da", of_gradient(torch.zeros_like(G)))
    with pytest.raises(DegenerateError, match="its gradient is not finite"):
        start("lora_da", of_gradient() | {"gradient.S": torch.full((OUT,), torch.nan)})
    with pytest.raises(CalibrationError, match="LoRA-DA decomposes the natural gradient, which takes all entries of"):
        start("lora_da", {key: value for key, value in of_gradient().items() if key != "gradient.dense"})
    with pytest.raises(ConfigError, match="samples='train' is the number of rows that are trained on, which"):
        start("lora_da", of_gradient(), LoraDAConfig(samples="train"))
    with pytest.raises(ConfigError, match="stable_gamma='auto' is found by the loss on held-out rows"):
        start("lora_da", of_gradient(), LoraDAConfig(stable_gamma="auto"))
    for name, value in (("samples", 0), ("samples", "all"), ("beta", -1), ("alpha", 0), ("stable_gamma", 0)):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            LoraDAConfig(**{name: value})


# ---- the control of LoRAM


@pytest.mark.parametrize("name", ["loram", "loram_subtracted"])
def test_the_control_is_as_large_as_lora_one_and_has_nothing_of_its_directions(name: str) -> None:
    found, one = start(name, {}, LoramConfig(stable_gamma=64.0)), start("lora_one", of_gradient(), LoraOneConfig())
    values = torch.linalg.svdvals(S * found.B @ found.A)[:R]
    close(values, torch.full((R,), S / 64, dtype=torch.float64), 1e-12)
    of_one = torch.linalg.svdvals(S * one.B @ one.A)[0]
    close(of_one, torch.tensor(S / 128, dtype=torch.float64), 1e-12)
    close(found.A @ found.A.mT, torch.eye(R, dtype=torch.float64) / 64, 1e-12)
    close(found.B.mT @ found.B, torch.eye(R, dtype=torch.float64) / 64, 1e-12)
    assert overlap(found.A, one.A) < 0.5
    assert found.subtract_from_base == (name == "loram_subtracted")


def test_the_sign_of_the_control_is_random() -> None:
    step = -best(G, R)
    along = []
    for seed in range(40):
        found = start("loram", {}, seed=seed)
        along.append(float((found.B @ found.A * step).sum()))
    assert 8 < sum(value > 0 for value in along) < 32
    assert not torch.equal(start("loram", {}, key="other").A, start("loram", {}).A)


def test_the_control_without_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="or set a number: 128 is LoRA-One's"):
        start("loram", {}, LoramConfig(stable_gamma="auto"))
    with pytest.raises(ConfigError, match="stable_gamma must be a number > 0, or 'auto'"):
        LoramConfig(stable_gamma=0)
