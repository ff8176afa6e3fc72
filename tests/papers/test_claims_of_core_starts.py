"""Starts with something between B and A, or of several experts: LoRA-SB, KaSA, GOAT."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import DegenerateError, InitResult
from lorafa.initializers.goat import GoatConfig
from lorafa.initializers.lora_sb import LoraSBConfig
from lorafa.numerics.linalg import full_svd
from lorafa.spec import LayerSpec
from toys.adapters import read_by
from toys.compare import best, close
from toys.data import rand

OUT, IN, R, S = 24, 32, 4, 1.7


W, G = rand(OUT, IN, seed=1), rand(OUT, IN, seed=2)


def stats_of(gradient: Tensor = G) -> dict[str, Tensor]:
    found = {f"gradient.{key}": value for key, value in full_svd(gradient)._asdict().items()}
    return found | {"gradient.dense": gradient}


def start(name: str, settings: Any = None, stats: dict[str, Tensor] | None = None, **spec: Any) -> InitResult:
    values = {"name": "layers.0.q_proj", "kind": "linear", "rank": R, "scaling": S, "seed": 0, "settings": settings}
    layer = LayerSpec(**(values | spec))  # type: ignore[arg-type]
    return INITIALIZERS.get(name)(W, stats_of() if stats is None else stats, layer)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, dtype=torch.float64)
        self.layer.weight = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def adapted(name: str, **settings: Any) -> PeftModel:
    settings = {"r": R, "lora_alpha": S * R, "init_seed": 0, "init_lora_weights": name} | settings
    stats = read_by(settings["init_lora_weights"], {"layer": stats_of()})
    return get_peft_model(Model(), LoraConfig(target_modules=["layer"], **settings), stats=stats)


def weight_of(model: PeftModel) -> Tensor:
    layer = model.get_base_model().layer
    change: Tensor = layer.get_delta_weight("default")
    return (W + change).detach()


# ---- LoRA-SB


@pytest.mark.parametrize("eta", [1e-5, 0.1])
@pytest.mark.parametrize("scaling", [1.0, S])
def test_lora_sb_starts_at_the_first_step_of_adam_cut_to_rank_r(eta: float, scaling: float) -> None:
    """s B R A = [-eta sign(G)]_r, B and A^T orthonormal, R = S_r / s; the size of the gradient does not matter."""
    for gradient in (G, 1e-6 * G):
        result = start("lora_sb", LoraSBConfig(eta), stats_of(gradient), scaling=scaling)
        core = result.extras["core"]
        close(scaling * result.B @ core @ result.A, best(-eta * G.sign(), R))
        close(result.A @ result.A.mT, torch.eye(R))
        close(result.B.mT @ result.B, torch.eye(R))
        close(core, torch.diag(eta / scaling * torch.linalg.svdvals(G.sign())[:R]))
    assert not result.subtract_from_base
    assert result.taken is None


def test_lora_sb_of_a_wide_layer_leaves_no_more_of_the_step_than_it_must() -> None:
    """Signs are noise, of which the leading triplets are not exact here: ||M - s B R A|| is that of M - [M]_r."""
    signs = rand(384, 320, seed=3).sign().float()
    stats = {"gradient.dense": signs, "gradient.S": torch.ones(R)}
    result = start("lora_sb", LoraSBConfig(1.0), stats)
    left = torch.linalg.matrix_norm(-signs - S * result.B @ result.extras["core"] @ result.A)
    tail = torch.linalg.svdvals(signs.double())[R:].square().sum().sqrt()
    torch.testing.assert_close(left.double(), tail, rtol=1e-5, atol=0)


def test_a_lora_sb_model_starts_there_and_trains_the_core_alone() -> None:
    """r^2 numbers a layer are trained."""
    model = adapted("lora_sb", init_config=LoraSBConfig(eta=0.1))
    close(weight_of(model), W + best(-0.1 * G.sign(), R))
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"base_model.model.layer.lora_core.default.weight": (R, R)}


def test_gradient_of_the_core_is_that_of_the_weight_between_b_and_a() -> None:
    """g_R = s B^T G A^T; the step it makes, s^2 B g_R A, is P_B G P_A: the nearest to G their span holds, times s^2."""
    model, x = adapted("lora_sb", init_config=LoraSBConfig(eta=0.1)), rand(50, IN, seed=3)
    layer, probe = model.get_base_model().layer, rand(50, OUT, seed=4)
    (model(x) * probe).sum().backward()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    gradient, whole = layer.lora_core["default"].weight.grad, probe.mT @ x
    close(gradient, S * B.mT @ whole @ A.mT)
    assert A.grad is None
    assert B.grad is None
    P_A, P_B = (torch.linalg.pinv(A) @ A).detach(), (B @ torch.linalg.pinv(B)).detach()
    close((S * B @ gradient @ A).detach(), S**2 * P_B @ whole @ P_A, 1e-10)


def test_lora_sb_on_a_gradient_of_zero_starts_at_the_base_and_still_has_a_gradient() -> None:
    config = LoraConfig(target_modules=["layer"], r=R, init_lora_weights="lora_sb", init_seed=0)
    with pytest.warns(UserWarning, match=r"layer \(the sign of its gradient has 0 singular values other than zero"):
        model = get_peft_model(Model(), config, stats={"layer": stats_of(torch.zeros_like(G))})
    x, layer = rand(5, IN), model.get_base_model().layer
    assert torch.equal(model(x), layer.base_layer(x))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    close(A @ A.mT, torch.eye(R), 1e-6)
    close(B.mT @ B, torch.eye(R), 1e-6)
    model(x).square().sum().backward()
    assert layer.lora_core["default"].weight.grad.abs().min() > 0


def test_lora_sb_refuses_a_gradient_that_is_not_finite_and_one_without_entries() -> None:
    bad = {key: value * torch.nan for key, value in stats_of().items()}
    with pytest.raises(DegenerateError, match=r"^its gradient is not finite"):
        start("lora_sb", stats=bad)
    sketch = {key: value for key, value in stats_of().items() if key != "gradient.dense"}
    text = (
        r"q_proj: LoRA-SB takes the signs of all entries of the gradient, and the statistics hold a sketch, which does "
        r"not have them\. Collect them with dense=True"
    )
    with pytest.raises(CalibrationError, match=text):
        start("lora_sb", stats=sketch)
    with pytest.raises(ConfigError, match=r"rank 25 is larger than min\(out, in\) = 24"):
        start("lora_sb", rank=25)


def test_step_of_lora_sb_is_a_number_above_zero() -> None:
    with pytest.raises(ConfigError, match="eta must be a number > 0, found 0"):
        LoraSBConfig(eta=0)


# ---- KaSA


def test_kasa_drops_the_r_smallest_singular_values_and_draws_a_diagonal() -> None:
    """The base counts as [W]_{k-r}; A as by default, B = 0, d ~ N(0, 1)."""
    result, plain = start("kasa"), start("kaiming")
    assert result.taken is not None
    A0, B0 = result.taken
    close(W - S * B0 @ A0, best(W, min(OUT, IN) - R))
    assert torch.equal(result.A, plain.A)
    assert not result.B.any()
    wide = start("kasa", rank=20).extras["diagonal"]
    assert wide.shape == (20,)
    assert 0.5 < wide.std() < 1.5
    assert wide.min() < 0 < wide.max()
    other = start("kasa", seed=1).extras["diagonal"]
    assert not torch.equal(other, result.extras["diagonal"])


def test_a_kasa_model_is_the_cut_base_and_trains_factors_and_diagonal() -> None:
    """s B diag(d) A on [W]_{k-r}, which stays as it is whatever A, B and d become."""
    model = adapted("kasa")
    cut = best(W, min(OUT, IN) - R)
    close(weight_of(model), cut)
    layer = model.get_base_model().layer
    parts = {name: getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B", "lora_diag")}
    assert all(p.requires_grad for p in parts.values())
    assert sum(p.requires_grad for p in model.parameters()) == 3
    with torch.no_grad():
        for parameter in parts.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    A, B, d = parts.values()
    close(weight_of(model), cut + S * B @ torch.diag(d) @ A)
    x = rand(5, IN)
    close(model(x), x @ (cut + S * B @ torch.diag(d) @ A).mT + layer.get_base_layer().bias)


def test_kasa_with_dropout_drops_the_input_of_the_update_and_not_that_of_the_cut_base() -> None:
    model = adapted("kasa", lora_dropout=0.5)
    layer = model.get_base_model().layer
    nn.init.normal_(layer.lora_B["default"].weight)
    A, B, d = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B", "lora_diag"))
    one, bias = torch.eye(IN, dtype=torch.float64)[3:4], layer.get_base_layer().bias  # it is kept and doubled, or goes
    dropped = best(W, min(OUT, IN) - R)[:, 3] + bias
    kept = dropped + 2 * S * (B @ torch.diag(d) @ A)[:, 3]
    outputs = [model(one)[0].detach() for _ in range(40)]
    are_kept = [torch.allclose(output, kept) for output in outputs]
    assert all(same or torch.allclose(output, dropped) for same, output in zip(are_kept, outputs, strict=True))
    assert 5 < sum(are_kept) < 35


def test_kasa_leaves_something_of_the_weight() -> None:
    text = r"q_proj: KaSA drops the r = 24 smallest singular values of a weight \(24, 32\), which has 24\. Lower the r"
    with pytest.raises(ConfigError, match=text):
        start("kasa", rank=24)


# ---- GOAT


@pytest.mark.parametrize("last", [False, True], ids=["goat", "goat_mini"])
def test_experts_of_goat_start_at_disjoint_parts_of_the_spectrum(last: bool) -> None:
    """s B_i A_i is U S V^T / rho of d triplets of segment i, of floor(k / E) triplets each."""
    experts, rho, r = 4, 10.0, 8
    settings, s = GoatConfig(experts=experts, rho=rho, last=last), S * experts  # alpha / d
    result, U, values, Vh = start("goat", settings, rank=r), *full_svd(W)
    length, d = min(OUT, IN) // experts, r // experts
    for i in range(experts):
        first = i * length + (length - d if last else 0)
        picked, own = slice(first, first + d), slice(i * d, (i + 1) * d)
        close(s * rho * result.B[:, own] @ result.A[own], U[:, picked] * values[picked] @ Vh[picked])
        close(result.A[own] @ result.A[own].mT, torch.diag(values[picked]) / (s * rho))
        close(result.B[:, own].mT @ result.B[:, own], torch.diag(values[picked]) / (s * rho))


def test_goat_takes_out_of_the_base_what_random_routing_adds_on_average() -> None:
    """The mean over all sets of k experts of equal weights is (1 / E) sum B_i A_i, whatever k is."""
    experts, r = 4, 8
    result = start("goat", GoatConfig(experts=experts), rank=r)
    assert result.taken is not None
    A0, B0 = result.taken
    d = r // experts
    products = [result.B[:, i * d : (i + 1) * d] @ result.A[i * d : (i + 1) * d] for i in range(experts)]
    for k in (1, 2, 3):
        routed = [sum(products[i] for i in chosen) / k for chosen in combinations(range(experts), k)]
        close(B0 @ A0, sum(routed) / len(routed))  # type: ignore[arg-type, operator]


@pytest.mark.parametrize(
    ("rule", "wanted"), [("classic", S * 8 / 2), ("rs", S * 8 / 2**0.5), ("goat", (3 * IN / 2) ** 0.5), (0.7, 0.7)]
)
def test_the_scaling_of_goat_decides_over_the_size_of_the_factors(rule: str | float, wanted: float) -> None:
    """d = 2, alpha = 8 S; "goat" is sqrt(3 eta n / d) with eta = 1. s B_i A_i is the same whatever s is."""
    settings = GoatConfig(experts=4, scaling=rule)
    result, (_, values, _) = start("goat", settings, rank=8), full_svd(W)
    close(result.A[:2] @ result.A[:2].mT, torch.diag(values[:2]) / (wanted * 10))


def test_the_scaling_of_the_paper_makes_the_gradient_of_the_factors_that_of_the_weight() -> None:
    """For Kaiming's A of variance 1 / (3 n) the mean of s^2 A^T A is the identity, A (d, n)."""
    n, d = 64, 4
    A = torch.rand(2000, d, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    A = A / n**0.5
    close(3 * n / d * (A.mT @ A).mean(0), torch.eye(n), 0.1)


def test_goat_shares_its_rank_out_among_the_experts() -> None:
    text = r"q_proj: GOAT gives each of 4 experts the rank r / 4, found r = 6\. Set r \(rank_pattern for"
    with pytest.raises(ConfigError, match=text):
        start("goat", GoatConfig(experts=4), rank=6)
    text = r"q_proj: GOAT takes r / 4 = 8 singular values of each of 4 segments of .*, which have 6\. Set r .* to 24"
    with pytest.raises(ConfigError, match=text):
        start("goat", GoatConfig(experts=4), rank=32)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"experts": 0}, "experts must be an integer >= 1, found 0"),
        ({"rho": 0}, "rho must be a number > 0, found 0"),
        ({"last": 1}, r"last must be True or False, found 1 \(int\)\."),
        ({"top_k": 0}, "top_k must be an integer >= 1, found 0"),
        ({"top_k": 9}, "top_k=9 is more than there are experts, 8. Lower top_k, or set more experts."),
        ({"scaling": "alpha"}, "scaling .*'alpha'.*classic"),
        ({"scaling": 0.0}, "scaling must be a number > 0 or one of 'classic', 'rs', 'goat', found 0.0"),
        ({"balance": -1.0}, "balance must be a number >= 0, found -1.0"),
    ],
)
def test_settings_of_goat_are_checked(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GoatConfig(**setting)


@pytest.mark.parametrize("name", ["kasa", "goat"])
def test_a_weight_with_nan_is_degenerate(name: str) -> None:
    spec = LayerSpec("layers.0.q_proj", "linear", 8, S, 0)
    with pytest.raises(DegenerateError, match=r"^its weight is not finite"):
        INITIALIZERS.get(name)(W * torch.nan, {}, spec)
