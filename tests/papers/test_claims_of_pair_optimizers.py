"""What LoRA+, LoRA-Pro, Riemannian preconditioning and LoRA-One's AdamW promise: claims about numbers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafa.linalg import exceeds, sylvester
from lorafa.optimizers import create_lorapro_optimizer, create_preconditioned_adamw, create_riemannian_optimizer
from lorafa.optimizers.lora_pro import CHOICES, adjusted_gradients
from lorafa.optimizers.pairs import Pair, pairs_of
from optimizer_toys import adapted, batch, loss, row_projector, update, weight_gradients

M, N, R, S = 9, 11, 3, 1.7


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


def test_lora_ones_adamw_moves_A_first_and_conditions_B_with_the_new_A() -> None:
    model, reg, lr, eps = adapted(), 1e-2, 0.05, 1e-8
    loss(model, batch()).backward()
    expected = {}
    for pair in pairs_of(model):
        eye = torch.eye(3, dtype=torch.float64)

        def step(value: Tensor, g: Tensor) -> Tensor:
            """Adam's first step without bias correction."""
            return value - lr * 0.1 * g / ((0.001 * g * g).sqrt() + eps)

        A = step(pair.A, torch.linalg.inv(pair.B.T @ pair.B + reg * eye) @ pair.A.grad).detach()
        B = step(pair.B, pair.B.grad @ torch.linalg.inv(A @ A.T + reg * eye)).detach()
        expected[pair.path] = (A, B)
    create_preconditioned_adamw(model, lr=lr, prec_reg=reg, eps=eps).step()
    for pair in pairs_of(model):
        near(pair.A.detach(), expected[pair.path][0], 1e-9)
        near(pair.B.detach(), expected[pair.path][1], 1e-9)


def test_lora_pro_in_full_is_adam_on_the_weight_projected_back() -> None:
    """Two steps of the paper's algorithm, written out with dense matrices."""
    model, lr, eps = adapted(), 0.01, 1e-8
    optimizer = create_lorapro_optimizer(model, lr=lr, form="full", X="sylvester", eps=eps, damping=0.0)
    pairs = pairs_of(model)
    expected = {pair: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs}
    m = {pair: torch.zeros(pair.B.shape[0], pair.A.shape[1], dtype=torch.float64) for pair in pairs}
    v = {pair: torch.zeros_like(m[pair]) for pair in pairs}
    for step in (1, 2):
        torch.manual_seed(step)
        G = weight_gradients(model, batch())
        for pair in pairs:
            A, B = expected[pair]
            g = tangent(A, B, G[pair.path])
            m[pair] = 0.9 * m[pair] + 0.1 * g
            v[pair] = 0.999 * v[pair] + 0.001 * g * g
            h = m[pair] / (1 - 0.9**step) / ((v[pair] / (1 - 0.999**step)).sqrt() + eps)
            s = torch.full((1, 1, 1), pair.scaling, dtype=torch.float64)
            for_A, for_B = adjusted_gradients(
                A[None], B[None], (pair.scaling * B.T @ h)[None], (pair.scaling * h @ A.T)[None], s, "sylvester"
            )
            expected[pair] = A - lr * for_A[0], B - lr * for_B[0]
        optimizer.step()
        optimizer.zero_grad()
    for pair in pairs:
        near(pair.A.detach(), expected[pair][0], 1e-8)
        near(pair.B.detach(), expected[pair][1], 1e-8)
    held = sum(
        value.numel() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
    assert held == sum(2 * pair.B.shape[0] * pair.A.shape[1] for pair in pairs)
