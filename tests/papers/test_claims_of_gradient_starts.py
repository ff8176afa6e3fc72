"""Starts from gradients: each property as its paper states it, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import LoraGAConfig
from lorafa.calibration.gradient import whitening
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult
from lorafa.initializers.gora import GoraConfig
from lorafa.initializers.lora_one import LoraOneConfig
from lorafa.numerics.linalg import full_svd
from lorafa.spec import LayerSpec
from toys.compare import best, close
from toys.data import rand

OUT, IN, R, S = 24, 32, 3, 1.7
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")


W, G = rand(OUT, IN, seed=1), rand(OUT, IN, seed=2)
X = rand(200, IN, seed=3) * torch.linspace(0.1, 3, IN, dtype=torch.float64)
C = X.mT @ X / len(X)


def stats_of(gradient: Tensor = G) -> dict[str, Tensor]:
    found, white = full_svd(gradient), full_svd(gradient @ whitening(C))
    named = {"gradient": found, "whitened_gradient": white}
    tensors = {f"{name}.{key}": value for name, svd in named.items() for key, value in svd._asdict().items()}
    return tensors | {"second_moment.C": C, "gradient.dense": gradient}


def start(name: str, settings: Any = None, stats: dict[str, Tensor] | None = None, **spec: Any) -> InitResult:
    values = {"name": "layers.0.q_proj", "kind": "linear", "rank": R, "scaling": S, "seed": 0, "settings": settings}
    return INITIALIZERS.get(name)(W, stats or stats_of(), LayerSpec(**(values | spec)))  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lora_ga_first_update_is_the_best_step_of_rank_2r(direction: str) -> None:
    """Theorem 3.1: B B^T G + G A^T A = [G]_2r for unit factors of disjoint index sets."""
    result = start("lora_ga", LoraGAConfig(direction=direction, scale="unit"))
    close(result.B @ result.B.mT @ G + G @ result.A.mT @ result.A, best(G, 2 * R))
    assert result.subtract_from_base


def test_lora_ga_directions_take_the_triplets_their_names_say() -> None:
    U, _, Vh = full_svd(G)
    for direction, index_A, index_B in (
        ("ArB2r", [0, 1, 2], [3, 4, 5]),
        ("A2rBr", [3, 4, 5], [0, 1, 2]),
        ("ArBr", [1, 3, 5], [0, 2, 4]),
    ):
        result = start("lora_ga", LoraGAConfig(direction=direction, scale="unit"))
        close(result.A, Vh[index_A])
        close(result.B, U[:, index_B])


def test_lora_ga_scales_multiply_both_factors_alike() -> None:
    unit = start("lora_ga", LoraGAConfig(scale="unit"))
    root = (torch.linalg.svdvals(W)[:R] / S).sqrt().mean()
    for scale, factor in (("stable", OUT**0.25 / 4), ("gd_scale", 1 / S), ("weight_svd", float(root))):
        result = start("lora_ga", LoraGAConfig(scale=scale, stable_gamma=16))
        close(result.A, factor * unit.A)
        close(result.B, factor * unit.B)


def test_lora_ga_as_peft_has_it_puts_singular_values_and_scale_on_B_alone() -> None:
    U, values, Vh = full_svd(G)
    for scale, on_A, on_B in (
        ("stable", 1.0, OUT**0.25 / 4),
        ("gd_scale", 1 / S, 1 / S),
        ("unit", 1.0, 1.0),
        ("weight_svd", 1.0, float(torch.linalg.svdvals(W)[0] / values[R])),
    ):
        result = start("lora_ga_peft", LoraGAConfig(scale=scale, stable_gamma=16))
        close(result.A, on_A * Vh[:R])
        close(result.B, on_B * U[:, R : 2 * R] * values[R : 2 * R])
    same = start("lora_ga_peft", LoraGAConfig(direction="random", scale="unit"))
    sizes = torch.linalg.vector_norm(G @ same.A.mT, dim=0)
    close(torch.linalg.vector_norm(same.B, dim=0), sizes)


def test_lora_one_is_a_rank_r_gradient_step_of_one_size_for_every_layer() -> None:
    """s B A = -(s / (gamma sigma_1)) [G]_r, so that ||s B A||_2 = s / gamma; the factors are balanced."""
    for gradient in (G, 1e-4 * G):
        result = start("lora_one", LoraOneConfig(stable_gamma=128), stats_of(gradient))
        sigma = torch.linalg.svdvals(gradient)
        close(S * result.B @ result.A, -S / (128 * sigma[0]) * best(gradient, R))
        close(torch.linalg.matrix_norm(S * result.B @ result.A, 2), torch.tensor(S / 128, dtype=torch.float64))
        close(result.A @ result.A.mT, torch.diag(sigma[:R] / sigma[0]) / 128)
        close(result.B.mT @ result.B, torch.diag(sigma[:R] / sigma[0]) / 128)
    assert not result.subtract_from_base


def test_lora_one_scales_and_normalisations() -> None:
    sigma = torch.linalg.svdvals(G)
    root = (torch.linalg.svdvals(W)[:R] / S).sqrt().mean().item()
    for scale, factor in (("gd", 1 / S**2), ("unit", 1.0), ("weightS", root**2)):
        result = start("lora_one", LoraOneConfig(scale=scale))
        close(result.B @ result.A, -factor / sigma[0] * best(G, R))
    stats = stats_of() | {"gradient.largest": 5 * sigma[0]}
    for normalize, divisor in (("global", 5 * sigma[0]), ("none", 1.0)):
        result = start("lora_one", LoraOneConfig(normalize=normalize), stats)
        close(result.B @ result.A, -best(G, R) / (128 * divisor))


@pytest.mark.parametrize(("name", "which"), [("lora_one", "gradient"), ("functional", "whitened_gradient")])
def test_the_largest_of_all_layers_is_not_taken_to_be_that_of_one(name: str, which: str) -> None:
    said = (
        rf"q_proj: normalize='global' divides by the largest singular value of all layers, {which}\.largest, which the "
        r"statistics do not hold\. Collect them with lorafa\.collect_statistics, or set normalize='layer'\."
    )
    with pytest.raises(CalibrationError, match=said):
        start(name, LoraOneConfig(normalize="global"))


def test_lora_one_lowers_the_loss_to_first_order_by_the_energy_of_its_triplets() -> None:
    """The drop is (s / (gamma sigma_1)) sum of sigma_i^2 for a small step; here on a quadratic loss."""
    target = rand(OUT, IN, seed=7)

    def loss(weight: Tensor) -> Tensor:
        return 0.5 * (weight - target).square().sum()

    gradient, gamma = W - target, 1e6
    result = start("lora_one", LoraOneConfig(stable_gamma=gamma), stats_of(gradient))
    sigma = torch.linalg.svdvals(gradient)
    drop = loss(W) - loss(W + S * result.B @ result.A)
    expected = S / (gamma * sigma[0]) * sigma[:R].square().sum()
    torch.testing.assert_close(drop, expected, rtol=1e-4, atol=0)


def functional_value(delta: Tensor, eta: float) -> Tensor:
    """<G, D> + ||D C_d^1/2||^2 / (2 eta), with the damped second moment."""
    inverse = whitening(C)
    root = torch.linalg.inv(inverse)
    return (G * delta).sum() + (delta @ root).square().sum() / (2 * eta)


def test_functional_start_minimises_the_first_order_loss_and_the_change_of_outputs() -> None:
    """Value -(eta / 2) sum of sigma_i(G C^-1/2)^2, and no other matrix of rank r has a smaller one."""
    M = whitening(C)
    sigma = torch.linalg.svdvals(G @ M)
    result = start("functional", LoraOneConfig(stable_gamma=128))
    delta, eta = result.B @ result.A, float(1 / (128 * sigma[0]))
    close(delta, -eta * best(G @ M, R) @ M)
    value = functional_value(delta, eta)
    close(value, -eta / 2 * sigma[:R].square().sum())
    for seed in range(20):
        near = (result.B + 1e-3 * rand(OUT, R, seed=seed)) @ (result.A + 1e-3 * rand(R, IN, seed=seed + 50))
        assert functional_value(near, eta) > value
    plain = best(G, R)  # the best multiple of LoRA-One's direction is worse
    multiple = -(G * plain).sum() * eta / (plain @ torch.linalg.inv(M)).square().sum()
    assert functional_value(multiple * plain, eta) > value


def test_functional_start_on_white_inputs_is_lora_one() -> None:
    stats = stats_of() | {"second_moment.C": torch.eye(IN, dtype=torch.float64)}
    M = whitening(stats["second_moment.C"])
    stats |= {f"whitened_gradient.{k}": v for k, v in full_svd(G @ M)._asdict().items()}
    one, two = (start(name, LoraOneConfig(), stats) for name in ("lora_one", "functional"))
    close(two.B @ two.A / (two.B @ two.A).norm(), one.B @ one.A / (one.B @ one.A).norm())


def test_stable_steps_are_of_one_size_in_the_metric_of_the_start_where_the_layer_normalizes_them() -> None:
    """||s B A|| = s / gamma for LoRA-One, ||s B A M^1/2|| = s / gamma for the functional start, and not otherwise."""
    M = torch.linalg.inv(whitening(C))
    for name, metric in (("lora_one", torch.eye(IN, dtype=torch.float64)), ("functional", M)):
        for normalize in ("layer", "none"):
            settings = LoraOneConfig(stable_gamma=64, normalize=normalize)
            result = start(name, settings)
            size = float(torch.linalg.matrix_norm(S * result.B @ result.A @ metric, 2))
            assert (size == pytest.approx(S / 64)) is (normalize == "layer")
    result = start("functional", LoraOneConfig(stable_gamma=64))
    assert float(torch.linalg.matrix_norm(S * result.B @ result.A, 2)) != pytest.approx(S / 64)


def test_gora_fits_the_gradient_within_the_rows_of_its_A() -> None:
    """s B A = -step sqrt(n / r) G P_A: the residual of least squares is what A cannot see."""
    result, plain = start("gora", GoraConfig(step=0.05)), start("kaiming")
    close(result.A, plain.A.double())
    P = torch.linalg.pinv(result.A) @ result.A
    close(S * result.B @ result.A, -0.05 * (IN / R) ** 0.5 * G @ P, 1e-10)


def test_gora_needs_no_more_rows_than_the_layer_has_inputs() -> None:
    text = (
        r"^layers\.0\.q_proj: GoRA fits B by the 33 rows of A, of which only 32 can be independent on a weight "
        r"\(24, 32\)\. Lower the rank to 32 \(rank_pattern sets it for single layers\) or leave the layer out with "
        r"exclude_modules\.$"
    )
    with pytest.raises(ConfigError, match=text):
        start("gora", rank=33)
    assert start("gora", rank=32).B.shape == (OUT, 32)


NAMES = ("lora_ga", "lora_ga_peft", "lora_one", "functional", "gora")


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zero_or_with_nan_is_degenerate(name: str) -> None:
    what = "its whitened gradient" if name == "functional" else "its gradient"
    zeros = {key: torch.zeros_like(value) if "gradient" in key else value for key, value in stats_of().items()}
    with pytest.raises(DegenerateError, match=f"^{what} (is zero|has 0 singular values other than zero)"):
        start(name, stats=zeros)
    bad = {key: value * torch.nan if "gradient" in key else value for key, value in stats_of().items()}
    with pytest.raises(DegenerateError, match=f"^{what} is not finite"):
        start(name, stats=bad)


def test_lora_ga_needs_two_r_directions() -> None:
    with pytest.raises(ConfigError, match=r"q_proj: LoRA-GA takes 2 r = 26 singular.*has 24\. Lower the rank to 12"):
        start("lora_ga", rank=13)
    few = {key: value[..., :4] if key.endswith("U") else value[:4] for key, value in stats_of().items()}
    text = r"q_proj: the statistics hold 4 directions of gradient, and r = 3 takes 6 here\. Collect them with a config"
    with pytest.raises(CalibrationError, match=text):
        start("lora_ga", stats=few)


def test_gamma_auto_is_for_initialize() -> None:
    with pytest.raises(ConfigError, match=r"stable_gamma='auto' is found by the loss on held-out rows\. Call lorafa"):
        start("lora_one", LoraOneConfig(stable_gamma="auto"))


@pytest.mark.parametrize("scale", ["unit", "gd", "weightS"])
@pytest.mark.parametrize("gamma", ["auto", 64.0])
def test_gamma_is_that_of_stable(scale: str, gamma: float | str) -> None:
    assert LoraOneConfig(scale="stable", stable_gamma=gamma).stable_gamma == gamma
    text = rf"stable_gamma={gamma!r} is the gamma of scale='stable', and scale is '{scale}'\. Set"
    with pytest.raises(ConfigError, match=text):
        LoraOneConfig(scale=scale, stable_gamma=gamma)
