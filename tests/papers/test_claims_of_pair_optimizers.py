"""What LoRA+, LoRA-Pro, Riemannian preconditioning and LoRA-One's AdamW promise: claims about numbers, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.numerics.linalg import exceeds, sylvester
from lorafa.optimizers import (
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.optimizers.lora_pro import CHOICES, adjusted_gradients
from lorafa.optimizers.pairs import Pair, pairs_of
from toys.optimizers import adapted, batch, loss, row_projector, update, weight_gradients

M, N, R, S = 9, 11, 3, 1.7
LR, DECAY, MOMENTUM, BETAS, EPS = 0.03, 0.2, 0.6, (0.7, 0.9), 1e-8
"""Of the runs that are written out; none is a default."""
PATTERNS: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 9.0}, "use_rslora": True}
SCALINGS = {"base_model.model.first": 9.0 / 3**0.5, "base_model.model.second": 5.0 / 2**0.5}


def factors(seed: int = 0, B_size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A (1, r, n), B (1, m, r) and a gradient of the weight (1, m, n)."""
    g = torch.Generator().manual_seed(seed)
    A, B, G = (torch.randn(1, *shape, generator=g, dtype=torch.float64) for shape in ((R, N), (M, R), (M, N)))
    return A, B_size * B, G


def gradients(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    return S * B.mT @ G, S * G @ A.mT


def adjusted(A: Tensor, B: Tensor, G: Tensor, X: str) -> tuple[Tensor, Tensor]:
    return adjusted_gradients(A, B, *gradients(A, B, G), torch.full((1, 1, 1), S, dtype=torch.float64), X)


def moved(A: Tensor, B: Tensor, G: Tensor, X: str) -> Tensor:
    """The step of the weight s (B h_A + h_B A)."""
    for_A, for_B = adjusted(A, B, G, X)
    return S * (B @ for_A + for_B @ A)


def tangent(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """P_B G + (I - P_B) G P_A."""
    P_A, P_B = row_projector(A), row_projector(B.mT)
    return P_B @ G + G @ P_A - P_B @ G @ P_A


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("X", CHOICES)
def test_lora_pro_moves_the_weight_by_the_tangent_projection_of_its_gradient(X: str) -> None:
    A, B, G = factors()
    near(moved(A, B, G, X), tangent(A, B, G))


def test_lora_pro_descends_by_the_square_of_what_it_can_reach() -> None:
    A, B, G = factors()
    P_A, P_B = row_projector(A), row_projector(B.mT)
    reached = (P_B @ G).square().sum() + (G @ P_A - P_B @ G @ P_A).square().sum()
    near(torch.sum(G * moved(A, B, G, "sylvester")), reached)


@pytest.mark.parametrize("X", CHOICES)
def test_the_basis_of_the_factors_does_not_change_the_step_of_lora_pro(X: str) -> None:
    A, B, G = factors()
    basis = (
        torch.randn(R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 2 * torch.eye(R).double()
    )
    near(moved(basis @ A, B @ torch.linalg.inv(basis), G, X), moved(A, B, G, X), 1e-9)


def test_the_sylvester_choice_keeps_the_gradients_nearest_to_the_plain_ones() -> None:
    """No small change of X brings (h_A, h_B) nearer to (g_A, g_B)."""
    A, B, G = factors()
    plain = gradients(A, B, G)
    for_A, for_B = adjusted(A, B, G, "sylvester")

    def distance(dX: Tensor) -> Tensor:
        return (for_A + dX @ A - plain[0]).square().sum() + (for_B - B @ dX - plain[1]).square().sum()

    at = torch.zeros(1, R, R, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(at), at)
    near(slope, torch.zeros_like(slope), 1e-9)


def test_the_symmetric_choice_shares_what_both_can_reach() -> None:
    A, B, G = factors()
    for_A, for_B = adjusted(A, B, G, "symmetric")
    P_A, P_B = row_projector(A), row_projector(B.mT)
    shared = P_B @ G @ P_A
    near(S * B @ for_A @ P_A, shared / 2)
    near(S * P_B @ for_B @ A, shared / 2)


def positive(condition: float, size: float, seed: int) -> Tensor:
    """(4, 5, 5), with eigenvalues from size / condition to size."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(4, 5, 5, generator=g, dtype=torch.float64))
    values = size * torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)
    return Q * values @ Q.mT


@pytest.mark.parametrize("of_left", [(2, 1e-3), (1e3, 1.0), (1e6, 1e4)], ids=str)
@pytest.mark.parametrize("of_right", [(1, 1.0), (2, 1.0), (1e3, 1e-3), (1e6, 1.0)], ids=str)
def test_the_equation_of_sylvester_is_solved(of_left: tuple[float, float], of_right: tuple[float, float]) -> None:
    """However well or badly conditioned its sides are, and whichever of them is larger."""
    left, right = positive(*of_left, seed=1), positive(*of_right, seed=2)
    target = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    X = sylvester(left, right, target)
    size = torch.linalg.matrix_norm(X) * (torch.linalg.matrix_norm(left) + torch.linalg.matrix_norm(right))
    assert float((torch.linalg.matrix_norm(left @ X + X @ right - target) / size).max()) < 1e-12


def test_eigenvalues_are_compared_with_a_bound() -> None:
    M = positive(1e6, 1.0, seed=1)
    bounds = torch.tensor([0.0, 0.99e-6, 1.01e-6, 2.0], dtype=torch.float64)
    assert exceeds(M, bounds).tolist() == [True, True, False, False]


@pytest.mark.parametrize("X", CHOICES)
def test_in_float32_lora_pro_is_as_exact_as_float32(X: str) -> None:
    """Its inverses are made in float64 of well conditioned Gram matrices, to which nothing is added."""
    A, B, G = factors()
    A, B = torch.linalg.qr(A.mT)[0].mT, torch.linalg.qr(B)[0]
    s = torch.full((1, 1, 1), S, dtype=torch.float64)
    exact = adjusted_gradients(A, B, *gradients(A, B, G), s, X)
    rounded = adjusted_gradients(*(x.float() for x in (A, B, *gradients(A, B, G), s)), X)
    for one, other in zip(rounded, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 5e-7


@pytest.mark.parametrize("X", CHOICES)
def test_at_a_zero_B_lora_pro_is_lora_fa(X: str) -> None:
    A, B, G = factors(B_size=0.0)
    for_A, for_B = adjusted(A, B, G, X)
    near(for_A, torch.zeros_like(A))
    near(S * for_B @ A, G @ row_projector(A))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("X", CHOICES)
def test_where_B_has_lost_its_rank_lora_pro_is_lora_fa_too(X: str, dtype: torch.dtype) -> None:
    """Whatever the damping: a column of B that repeats another leaves B^T B no inverse."""
    A, B, G = factors()
    B[..., 2] = 3 * B[..., 0]
    A, B, G = A.to(dtype), B.to(dtype), G.to(dtype)
    plain_A, plain_B = gradients(A, B, G)
    for_A, for_B = adjusted_gradients(A, B, plain_A, plain_B, torch.full((1, 1, 1), S, dtype=dtype), X, 1e-8)
    tolerance = 1e-6 if dtype is torch.float64 else 1e-4  # of the damping and of the rounding
    near(for_A, plain_A, tolerance)
    near(S * for_B @ A, G @ row_projector(A), tolerance)


def one_pair(model: torch.nn.Module) -> Pair:
    return pairs_of(model)[0]


def test_riemannian_descent_moves_the_weight_alike_in_every_basis_and_as_the_formula_says() -> None:
    """To first order by -lr s^2 (P_B G + G P_A)."""
    lr, moves = 1e-7, []
    for change in (False, True):
        torch.manual_seed(1)
        model, data = adapted(), batch()
        if change:
            basis = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 0.4]], dtype=torch.float64)
            for pair in pairs_of(model):
                pair.A.data, pair.B.data = basis @ pair.A.data, pair.B.data @ torch.linalg.inv(basis)
        G = weight_gradients(model, data)
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=lr, reg=0.0)
        before = {pair.path: update(pair) for pair in pairs_of(model)}
        optimizer.step()
        for pair in pairs_of(model):
            change_of_weight = (update(pair) - before[pair.path]) / lr
            P_A, P_B = row_projector(pair.A), row_projector(pair.B.mT)
            expected = -(pair.scaling**2) * (P_B @ G[pair.path] + G[pair.path] @ P_A)
            near(change_of_weight, expected, 1e-5)
        moves.append({pair.path: update(pair) for pair in pairs_of(model)})
    for path in moves[0]:
        near(moves[1][path], moves[0][path], 1e-11)


@pytest.mark.parametrize("damping", ["relative", "absolute"])
def test_riemannian_gradients_are_the_formula(damping: str) -> None:
    model, reg = adapted(), 0.3
    loss(model, batch()).backward()
    expected = {}
    for pair in pairs_of(model):
        eye = torch.eye(3, dtype=torch.float64)
        left, right = pair.B.T @ pair.B, pair.A @ pair.A.T
        size = (left.trace() / 3, right.trace() / 3) if damping == "relative" else (1.0, 1.0)
        for_A = torch.linalg.inv(left + reg * size[0] * eye) @ pair.A.grad
        for_B = pair.B.grad @ torch.linalg.inv(right + reg * size[1] * eye)
        expected[pair.path] = (pair.A - 0.1 * for_A).detach(), (pair.B - 0.1 * for_B).detach()
    create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=reg, damping=damping).step()
    for pair in pairs_of(model):
        near(pair.A.detach(), expected[pair.path][0])
        near(pair.B.detach(), expected[pair.path][1])


def test_relative_damping_does_not_see_the_size_of_the_factors() -> None:
    """A -> c A, B -> B / c is a change of basis, which keeps the step of the weight, damped or not."""
    moves = []
    for c in (1.0, 50.0):
        torch.manual_seed(1)
        model = adapted()
        for pair in pairs_of(model):
            pair.A.data, pair.B.data = c * pair.A.data, pair.B.data / c
        loss(model, batch()).backward()
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2, reg=0.1).step()
        moves.append({pair.path: update(pair) for pair in pairs_of(model)})
    for path in moves[0]:
        near(moves[1][path], moves[0][path], 1e-9)


# ---- several steps, written out with dense matrices

Factors = tuple[Tensor, Tensor]
State = dict[str, Tensor]


def torch_sgd(value: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    """Decay is added to the gradient, and the momentum is not damped."""
    g = g + DECAY * value
    state["m"] = MOMENTUM * state["m"] + g if state else g
    return value - LR * state["m"]


def adam_direction(g: Tensor, state: State, step: int, *, corrected: bool = True) -> Tensor:
    state["m"] = BETAS[0] * state.get("m", torch.zeros_like(g)) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", torch.zeros_like(g)) + (1 - BETAS[1]) * g * g
    c1, c2 = (1 - BETAS[0] ** step, 1 - BETAS[1] ** step) if corrected else (1.0, 1.0)
    return state["m"] / c1 / ((state["v"] / c2).sqrt() + EPS)


def torch_adamw(value: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    return (1 - LR * DECAY) * value - LR * adam_direction(g, state, step)


def damped_inverse(M: Tensor, d: float) -> Tensor:
    return torch.linalg.inv(M + d * torch.eye(len(M), dtype=M.dtype))


def pro_gradients(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, s: float, X: str, damping: float) -> Factors:
    """h_A (r, n) and h_B (m, r); the equation of Sylvester as a linear system in the r^2 entries of X."""
    rank = len(A)
    eye = torch.eye(rank, dtype=A.dtype)
    left, right = B.T @ B, A @ A.T
    left, right = (gram + damping * gram.trace() / rank * eye for gram in (left, right))
    inverse_B, inverse_A = torch.linalg.inv(left), torch.linalg.inv(right)
    shared = inverse_B @ B.T @ g_B @ inverse_A / s**2
    between = {"zero": 0 * shared, "symmetric": -shared / 2}.get(X)
    if between is None:
        system = torch.kron(left, eye) + torch.kron(eye, right)
        between = torch.linalg.solve(system, -(inverse_B @ g_A @ A.T / s**2).flatten()).view(rank, rank)
    projected = g_B - B @ inverse_B @ B.T @ g_B
    return inverse_B @ g_A / s**2 + between @ A, projected @ inverse_A / s**2 - B @ between


def compare_steps(model: nn.Module, optimizer: torch.optim.Optimizer, formula: Any, steps: int = 3) -> None:
    """``formula`` makes the new (A, B) of a pair from (A, B), the gradient of its weight, its scaling, its states."""
    pairs = pairs_of(model)
    expected = {pair: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs}
    states: dict[Pair, tuple[State, State]] = {pair: ({}, {}) for pair in pairs}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        G = weight_gradients(model, batch())
        for pair in pairs:
            expected[pair] = formula(*expected[pair], G[pair.path], SCALINGS[pair.path], states[pair], step)
        optimizer.step()
        for pair in pairs:
            near(pair.A.detach(), expected[pair][0], 1e-9)
            near(pair.B.detach(), expected[pair][1], 1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("X", CHOICES)
@pytest.mark.parametrize("form", ["sgd", "adamw"])
def test_steps_of_lora_pro_are_the_formula(form: str, X: str, damping: float) -> None:
    """With decay and momentum, and a rank and a scaling for each layer."""
    own, rule = ({"momentum": MOMENTUM}, torch_sgd) if form == "sgd" else ({"betas": BETAS}, torch_adamw)
    model = adapted(**PATTERNS)
    settings: dict[str, Any] = {"lr": LR, "form": form, "X": X, "weight_decay": DECAY, "damping": damping, **own}

    def formula(A: Tensor, B: Tensor, G: Tensor, s: float, states: tuple[State, State], step: int) -> Factors:
        for_A, for_B = pro_gradients(A, B, s * B.T @ G, s * G @ A.T, s, X, damping)
        return rule(A, for_A, states[0], step), rule(B, for_B, states[1], step)

    compare_steps(model, create_lorapro_optimizer(model, **settings), formula)


@pytest.mark.parametrize("X", CHOICES)
def test_lora_pro_in_full_is_adam_on_the_weight_projected_back(X: str) -> None:
    model = adapted(**PATTERNS)
    settings: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "damping": 0.0}
    optimizer = create_lorapro_optimizer(model, form="full", X=X, **settings)

    def formula(A: Tensor, B: Tensor, G: Tensor, s: float, states: tuple[State, State], step: int) -> Factors:
        h = adam_direction(tangent(A, B, G), states[0], step)
        for_A, for_B = pro_gradients(A, B, s * B.T @ h, s * h @ A.T, s, X, 0.0)
        kept = math.sqrt(1 - LR * DECAY)
        return kept * A - LR * for_A, kept * B - LR * for_B

    compare_steps(model, optimizer, formula)
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    assert held == sum(2 * pair.B.shape[0] * pair.A.shape[1] for pair in pairs_of(model))


def test_steps_of_lora_ones_adamw_move_A_first_and_condition_B_with_the_new_A() -> None:
    """And nothing corrects the bias, and decay comes last, as in the authors' code."""
    model, reg = adapted(**PATTERNS), 1e-2
    optimizer = create_preconditioned_adamw(model, lr=LR, prec_reg=reg, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def formula(A: Tensor, B: Tensor, G: Tensor, s: float, states: tuple[State, State], step: int) -> Factors:
        kept, g_A, g_B = 1 - LR * DECAY, s * B.T @ G, s * G @ A.T
        A = kept * (A - LR * adam_direction(damped_inverse(B.T @ B, reg) @ g_A, states[0], step, corrected=False))
        B = kept * (B - LR * adam_direction(g_B @ damped_inverse(A @ A.T, reg), states[1], step, corrected=False))
        return A, B

    compare_steps(model, optimizer, formula)


def test_steps_of_riemannian_adamw_are_the_formula() -> None:
    """Both preconditioners are of the factors before the step."""
    model, reg = adapted(**PATTERNS), 0.2
    settings: dict[str, Any] = {"reg": reg, "damping": "absolute", "betas": BETAS, "weight_decay": DECAY}
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, **settings)

    def formula(A: Tensor, B: Tensor, G: Tensor, s: float, states: tuple[State, State], step: int) -> Factors:
        for_A = damped_inverse(B.T @ B, reg) @ (s * B.T @ G)
        for_B = (s * G @ A.T) @ damped_inverse(A @ A.T, reg)
        return torch_adamw(A, for_A, states[0], step), torch_adamw(B, for_B, states[1], step)

    compare_steps(model, optimizer, formula)


def test_lora_pro_reads_a_scaling_that_was_changed_after_it_was_made() -> None:
    model = adapted()
    optimizer = create_lorapro_optimizer(model, lr=LR, form="sgd", damping=0.0)
    for pair in pairs_of(model):
        pair.layer.set_scale("default", 3.0)
    s = 3.0 * 5.0 / 3
    G = weight_gradients(model, batch())
    expected = {}
    for pair in pairs_of(model):
        A, B, g = pair.A.detach().clone(), pair.B.detach().clone(), G[pair.path]
        h = pro_gradients(A, B, s * B.T @ g, s * g @ A.T, s, "sylvester", 0.0)
        expected[pair.path] = A - LR * h[0], B - LR * h[1]
    optimizer.step()
    for pair in pairs_of(model):
        near(pair.A.detach(), expected[pair.path][0], 1e-9)
        near(pair.B.detach(), expected[pair.path][1], 1e-9)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(self.embed(x))
        return y


def test_lora_plus_steps_at_the_rates_and_the_decay_it_is_given() -> None:
    """loraplus_weight_decay stands before weight_decay, and spares vectors."""
    config = LoraConfig(r=2, target_modules=["embed", "first"], bias="lora_only")
    model = get_peft_model(Tokens().double(), config)
    with torch.no_grad():
        for pair in pairs_of(model):
            pair.A.copy_(torch.randn_like(pair.A))
            pair.B.copy_(torch.randn_like(pair.B))
    settings: dict[str, Any] = {"loraplus_lr_embedding": 0.02, "loraplus_weight_decay": 0.3, "weight_decay": 0.7}
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, **settings)
    model(torch.arange(9)).square().sum().backward()
    embed, first = pairs_of(model)
    assert (embed.layer.kind, first.layer.kind) == ("embedding", "linear")
    rates = [(embed.A, 0.02), (embed.B, 0.02), (first.A, 0.1), (first.B, 0.4)]
    expected = [(p - rate * (p.grad + 0.3 * p)).detach() for p, rate in rates]
    bias = first.layer.get_base_layer().bias
    expected_bias = (bias - 0.1 * bias.grad).detach()
    optimizer.step()
    for (parameter, _), value in zip(rates, expected, strict=True):
        near(parameter.detach(), value)
    near(bias.detach(), expected_bias)
