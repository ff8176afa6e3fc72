"""Gradients without gradients: against autograd's weight gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, initialize
from lorafa.calibration.base import CalibrationOptions
from lorafa.calibration.batches import Batches
from lorafa.calibration.collect import collect
from lorafa.calibration.gradient import (
    GradientSketch,
    WhitenedGradientSketch,
    gradient_triplets,
    whitening,
)
from lorafa.calibration.moments import SecondMoment
from lorafa.errors import CalibrationError, ConfigError
from lorafa.numerics.linalg import full_svd
from toys.calibration import LAYERS, Toy, collected, gradient_matrix, gradients, inputs, loss, over, statistics


def exact(gradient: Tensor, **kwargs: float) -> dict[str, float]:
    return {"rtol": 1e-10, "atol": 1e-10 * gradient.abs().max().item()} | kwargs


# Four tokens: gradients of rank at most four, eight for the layer that is called twice.
FEW = [x[:1, :2] for x in inputs(2)]


def test_the_dense_statistic_is_the_gradient() -> None:
    model, data = Toy(), inputs()
    found, expected = collected(model, data, dense=True), gradients(model, data)
    for name in LAYERS:
        torch.testing.assert_close(gradient_matrix(found[name]), expected[name], **exact(expected[name]))
        S = torch.linalg.svdvals(expected[name])
        triplets = gradient_triplets(found[name])
        torch.testing.assert_close(triplets.S, S[: len(triplets.S)], **exact(S))
        torch.testing.assert_close(found[name]["gradient.norm2"], S.square().sum(), **exact(S))


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_a_gradient_of_rank_at_most_k_is_recovered_exactly(passes: int) -> None:
    model = Toy()
    found, expected = collected(model, FEW, dense=False, passes=passes, rank=4), gradients(model, FEW)
    for name in LAYERS:  # 4 tokens, 8 calls of ``first``: rank 8
        torch.testing.assert_close(gradient_matrix(found[name]), expected[name], **exact(expected[name]))
        assert found[name]["gradient.error2"] < 1e-18 * found[name]["gradient.norm2"]


class Kept(GradientSketch):
    """Keeps what was added up."""

    def end_pass(self, number: int, weights: tuple[float, float]) -> None:
        super().end_pass(number, weights)
        self.kept = self.found.means[0]


def test_the_sketches_are_products_with_the_gradient() -> None:
    model, data = Toy(), inputs()
    named, expected = statistics(model, kind=Kept, dense=False), gradients(model, data)
    collect(model, {name: model.get_submodule(name) for name in named}, named, over(model, data))
    for name in LAYERS:
        sketch, G = named[name]["gradient"], expected[name]
        torch.testing.assert_close(sketch.kept.Y, G @ sketch.bases.right, **exact(G))  # type: ignore[attr-defined]
        torch.testing.assert_close(sketch.kept.Z, sketch.bases.left @ G, **exact(G))  # type: ignore[attr-defined]


def with_spectrum(values: Tensor, out: int, in_: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(in_, len(values), generator=generator, dtype=torch.float64)).Q
    return U * values @ V.mT


class Planted(nn.Module):
    """A layer whose gradient is G, given the identity as its input: the loss is <G, layer(I)^T>."""

    def __init__(self, G: Tensor) -> None:
        super().__init__()
        self.G = G
        self.layer = nn.Linear(G.shape[1], G.shape[0], bias=False, dtype=G.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.layer(x) * self.G.mT).sum()
        return y


def planted(G: Tensor, rank: int, noise: float = 0.0, batches: int = 1, **options: object) -> dict[str, Tensor]:
    model = Planted(G)
    eye, generator = torch.eye(G.shape[1], dtype=G.dtype), torch.Generator().manual_seed(5)
    named = statistics(model, rank, layers=("layer",), **options)

    def run(asked):  # type: ignore[no-untyped-def]
        for _ in range(batches):
            model.G = G + noise * torch.randn(G.shape, generator=generator, dtype=G.dtype)
            model(eye).backward()
            yield None

    return collect(model, {"layer": model.layer}, named, Batches(run, by_call=True))["layer"]


SEEDS = 200
"""A standard deviation of 0.12 is one of 0.009 of their mean."""
SPECTRA = {"i^-1/2": 0.5, "i^-1": 1.0, "i^-2": 2.0}


@pytest.mark.parametrize("power", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_error_on_decaying_spectra_is_close_to_the_best(power: float, passes: int) -> None:
    """||G - [G^]_r|| <= 2 times that of the best rank-r matrix, 1.1 times with a power iteration."""
    values = torch.arange(1, 301, dtype=torch.float64).pow(-power)
    G, r = with_spectrum(values, 300, 400), 8
    top = gradient_triplets(planted(G, r, dense=False, passes=passes)).at(slice(0, r))
    error = (G - top.product()).norm() / values[r:].square().sum().sqrt()
    assert 1 - 1e-9 <= error <= {1: 2.0, 2: 1.6, 4: 1.1}[passes]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_error_is_told_without_the_gradient(passes: int) -> None:
    """Ten rows of Theta tell ||R||^2 of what is missed, R, without bias, and spread as ten squares of Gaussians do: the
    variance of their mean is 2 / 10 sum sigma_i^4 for the singular values sigma_i of R, a deviation of about 0.12 of
    ||R||^2 here as on real layers. The norm is told far better: what its triplets hold is known."""
    G = with_spectrum(torch.arange(1, 81, dtype=torch.float64).pow(-0.75), 80, 90)
    told, scores = [], []
    for seed in range(SEEDS):
        found = planted(G, 4, dense=False, passes=passes, seed=seed)
        missed = torch.linalg.svdvals(G - gradient_triplets(found).product()).square()
        error, norm = found["gradient.error2"] / missed.sum(), found["gradient.norm2"] / G.square().sum()
        told.append(torch.stack([error, norm]))
        scores.append((error - 1) / (missed.square().sum() * 2 / 10).sqrt() * missed.sum())
    mean, spread = torch.stack(told).mean(0), torch.stack(told).std(0)
    torch.testing.assert_close(mean, torch.ones(2, dtype=torch.float64), rtol=0.05, atol=0)
    assert 0.09 < spread[0] < 0.16
    assert torch.stack(scores).std() == pytest.approx(1, abs=0.15)
    assert spread[1] < 0.12


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("planted_rank", [5, 0, 12])
def test_the_cross_validated_values_find_the_planted_rank(dense: bool, planted_rank: int) -> None:
    """Directions of signal hold in the other half what they hold in their own, those of noise next to nothing."""
    values = torch.linspace(3, 2, planted_rank, dtype=torch.float64) if planted_rank else torch.zeros(1).double()
    G = with_spectrum(values * 10, 80, 90)
    found = planted(G, 16, noise=0.5, batches=8, dense=dense, halves=True)
    cross, S = found["gradient.cross"][:16], found["gradient.S_half"][:16]
    assert int((cross >= 0.25 * S).sum()) == planted_rank


def test_halves_add_up_to_the_whole() -> None:
    model, data = Toy(), inputs(6)
    for options in ({"dense": True}, {"dense": False}, {"dense": False, "passes": 4}):
        whole, halves = (collected(model, data, halves=flag, rank=8, **options) for flag in (False, True))
        for name in LAYERS:
            G = gradient_matrix(whole[name])
            torch.testing.assert_close(gradient_matrix(halves[name]), G, **exact(G))


def test_batches_can_be_weighted() -> None:
    model, data, weights = Toy(), inputs(3), [5.0, 1.0, 2.0]
    found, expected = collected(model, data, weights, dense=True), gradients(model, data, weights)
    for name in LAYERS:
        torch.testing.assert_close(gradient_matrix(found[name]), expected[name], **exact(expected[name]))


def test_whitened_gradient_is_that_times_the_inverse_root_of_the_second_moment() -> None:
    model, expected = Toy(), gradients(Toy(), FEW)
    named = statistics(model, 4, SecondMoment, "second_moment")
    for passes in (1, 4):
        sketches = statistics(model, 4, WhitenedGradientSketch, "whitened_gradient", dense=False, passes=passes)
        both = {name: {"second_moment": SecondMoment(next(iter(named[name].values())).layer)} for name in LAYERS}
        both = {name: both[name] | sketches[name] for name in LAYERS}  # type: ignore[dict-item]
        found = collect(model, {name: model.get_submodule(name) for name in LAYERS}, both, over(model, FEW))  # type: ignore[arg-type]
        for name in LAYERS:
            target = expected[name] @ whitening(found[name]["second_moment.C"]).double()
            close = gradient_matrix(found[name], "whitened_gradient")
            torch.testing.assert_close(close, target, rtol=1e-4, atol=1e-5 * target.abs().max().item())


def rotated(values: Tensor) -> Tensor:
    """A positive definite matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(7)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=values.dtype)).Q
    return Q * values @ Q.mT


def test_whitening_caps_the_condition_of_the_damped_second_moment_at_ten_thousand() -> None:
    """One direction of the inputs dwarfs 399 others: damping alone leaves a condition of 4e4."""
    values = torch.cat([torch.linspace(1e-9, 1e-3, 399, dtype=torch.float64), torch.tensor([4e2]).double()])
    found = torch.linalg.eigvalsh(whitening(rotated(values))).pow(-2)
    largest = values[-1] + 0.01 * values.mean()
    expected = (values + 0.01 * values.mean()).clamp(min=largest / 1e4)
    torch.testing.assert_close(found.sort().values, expected, rtol=1e-9, atol=0)
    assert largest / (values[0] + 0.01 * values.mean()) > 3.9e4


def test_a_second_moment_of_moderate_condition_is_damped_only() -> None:
    C = rotated(torch.logspace(-1, 1, 60, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(C + 0.01 * C.diagonal().mean() * torch.eye(60, dtype=torch.float64))
    torch.testing.assert_close(whitening(C), vectors * values.rsqrt() @ vectors.mT, rtol=1e-10, atol=1e-12)


def test_sketch_and_start_of_inputs_with_one_huge_direction_share_one_metric() -> None:
    """G M^-1/2 is what is sketched, and the start is a step -c [G M^-1/2]_r M^-1/2 with the very same M."""
    data = [0.1 * x[:1, :2] for x in inputs(2, in_=320)]  # four tokens, so that a sketch of eight columns is exact
    for x in data:
        x[..., 0] = 300
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first"], init_lora_weights="functional")
    adapted = initialize(Toy(in_=320), config, data, loss=loss, dense=False)
    G, X = gradients(Toy(in_=320), data)["first"], torch.cat([x.reshape(-1, 320) for x in data])
    X = torch.cat([X, X / 2])  # ``first`` is called twice
    values, vectors = torch.linalg.eigh(X.mT @ X / len(X))
    values = values + 0.01 * values.mean()
    assert values[-1] > 2e4 * values[0]
    M = vectors * values.clamp(min=values[-1] / 1e4).rsqrt() @ vectors.mT
    white = full_svd(G @ M)
    step = -2 / (128 * white.S[0]) * white.at(slice(0, 2)).product() @ M
    layer = adapted.get_base_model().first
    found = 2 * layer.factor_B("default") @ layer.factor_A("default")
    torch.testing.assert_close(found, step, rtol=1e-6, atol=1e-8 * step.abs().max().item())


def test_inputs_that_are_not_finite_have_no_metric() -> None:
    assert whitening(torch.tensor([[1.0, 0.0], [0.0, torch.nan]])).isnan().all()
    model, data = Toy(), inputs()
    data[0][0, 0, 0] = torch.inf
    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights="functional")
    with pytest.warns(UserWarning, match=r"first \(its whitened gradient is not finite\)"):
        initialize(model, config, data, loss=loss)


def captured(found: dict[str, dict[str, Tensor]], expected: dict[str, Tensor]) -> list[float]:
    """The share of the energy of each gradient's best two directions that the two found hold."""
    shares = []
    for name, G in expected.items():
        best, top = full_svd(G).U[:, :2], found[name]["gradient.U"][:, :2].double()
        shares.append(((top.mT @ G).square().sum() / (best.mT @ G).square().sum()).item())
    return shares


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [True, False])
def test_half_precision_loses_little(dtype: torch.dtype, dense: bool) -> None:
    expected = gradients(Toy(), inputs())
    found = collected(Toy(dtype=dtype), inputs(dtype=dtype), dense=dense)
    assert found["first"]["gradient.U"].dtype is torch.float32
    assert captured(found, expected) == pytest.approx(
        captured(collected(Toy(), inputs(), dense=dense), expected), abs=0.01
    )


def test_a_gradient_that_is_not_finite_says_so_in_its_values() -> None:
    model, data = Toy(), inputs()
    data[2][0, 0, 0] = float("inf")
    for options in ({"dense": True}, {"dense": False}, {"dense": False, "passes": 2}):
        assert collected(model, data, **options)["first"]["gradient.S"].isnan().all()


def test_a_layer_no_batch_reached_has_a_gradient_of_zero() -> None:
    class Unused(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(5, 4)

    for options in ({"dense": True}, {"dense": False}, {"dense": False, "passes": 4, "halves": True}):
        found = collected(Unused(), inputs(), layers=("first", "unused"), **options)
        assert not found["unused"]["gradient.S"].any()
        assert found["first"]["gradient.S"].any()


def test_whole_gradients_are_added_up_where_that_is_no_more_work_than_sketching() -> None:
    """(k + l + q) (m + n) products for each token against m n: at r = 4, 59 (m + n)."""
    for size, dense in ((118, True), (119, False)):
        layer = nn.Sequential(nn.Linear(size, size))
        assert statistics(layer, 4, layers=("0",))["0"]["gradient"].dense == dense  # type: ignore[attr-defined]


def test_passes_are_one_or_even() -> None:
    with pytest.raises(ConfigError, match=r"passes must be 1 or an even number, found 3.*Pass 2 or 4\."):
        CalibrationOptions(passes=3)


def test_no_batch_and_no_backward_are_errors() -> None:
    model = Toy()
    with pytest.raises(CalibrationError, match="There was no batch to calibrate with: the data is empty"):
        collected(model, [], [])
    text = r"There was no batch to calibrate with: the function .* never called the model\. Let it call the very model"
    with pytest.raises(CalibrationError, match=text):
        collected(model, [])
    named = statistics(model)

    def forward_only(asked):  # type: ignore[no-untyped-def]
        model(inputs()[0])
        yield None

    with pytest.raises(CalibrationError, match=r"No gradient arrived at first, second, last: 1 batches ran and none"):
        collect(model, {name: model.get_submodule(name) for name in LAYERS}, named, Batches(forward_only, by_call=True))
