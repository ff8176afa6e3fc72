"""What the LoRA-FA paper promises (arXiv:2308.03303), and what follows from it: claims about numbers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import PeftModel
from lorafa.optimizers import LoraFAOptimizer, create_lorafa_optimizer
from lorafa.optimizers.lora_fa import fold_
from lorafa.optimizers.pairs import Pair, pairs_of
from lorafa.optimizers.row_space import RowSpace
from toys.optimizers import adapted, batch, loss, row_projector, update, weight_gradients


def test_the_projected_gradient_moves_the_weight_by_the_gradient_within_the_rows_of_A() -> None:
    """s g A = G P_A."""
    model, data = adapted(), batch()
    G = weight_gradients(model, data)
    found = RowSpace(pairs_of(model)).gradients()
    for pair in pairs_of(model):
        moved = pair.scaling * found[pair.B] @ pair.A
        torch.testing.assert_close(moved, G[pair.path] @ row_projector(pair.A), rtol=1e-12, atol=1e-12)


def test_no_other_step_of_B_comes_nearer_to_the_gradient_of_the_weight() -> None:
    """The normal equations of min || s g A - G ||_F: the residual is orthogonal to every s X A."""
    model, data = adapted(), batch()
    G = weight_gradients(model, data)
    found = RowSpace(pairs_of(model)).gradients()
    for pair in pairs_of(model):
        residual = pair.scaling * found[pair.B] @ pair.A - G[pair.path]
        torch.testing.assert_close(residual @ pair.A.T, torch.zeros_like(pair.B), rtol=0, atol=1e-12)


def test_with_orthonormal_rows_of_A_the_transform_is_one_over_the_scaling_squared() -> None:
    model = adapted()
    for pair in pairs_of(model):
        pair.A.data = torch.linalg.qr(pair.A.detach().T)[0].T.contiguous()
    loss(model, batch()).backward()
    for pair in pairs_of(model):
        found = RowSpace([pair]).gradients()
        torch.testing.assert_close(found[pair.B], pair.B.grad / pair.scaling**2, rtol=1e-12, atol=1e-14)


def test_the_norm_is_that_of_the_projected_gradient_of_the_weight() -> None:
    model, data = adapted(), batch()
    G = weight_gradients(model, data)
    expected = sum(float(torch.linalg.norm(G[p.path] @ row_projector(p.A))) ** 2 for p in pairs_of(model)) ** 0.5
    assert float(RowSpace(pairs_of(model)).norm()) == pytest.approx(expected, rel=1e-12)


def test_clipping_in_weight_space_is_the_same_in_every_basis_of_the_rows_of_A() -> None:
    results = []
    for basis in (None, torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3, dtype=torch.float64)):
        torch.manual_seed(1)
        model = adapted()
        change_basis(model, basis)
        loss(model, batch()).backward()
        rows = RowSpace(pairs_of(model))
        before = rows.norm()
        assert float(rows.clip_norm_(0.01)) == pytest.approx(float(before))
        assert float(rows.norm()) == pytest.approx(0.01, rel=1e-4)
        results.append({p.path: p.scaling * rows.gradients()[p.B] @ p.A for p in pairs_of(model)})
    for path, expected in results[0].items():
        torch.testing.assert_close(results[1][path], expected, rtol=1e-9, atol=1e-12)


def change_basis(model: PeftModel, basis: Tensor | None) -> None:
    """A -> M A, B -> B M^-1: the same function."""
    if basis is None:
        return
    with torch.no_grad():
        for pair in pairs_of(model):
            pair.A.copy_(basis @ pair.A)
            pair.B.copy_(pair.B @ torch.linalg.inv(basis))


def decay(pairs: list[Pair]) -> None:
    """Decoupled weight decay of B."""
    with torch.no_grad():
        for pair in pairs:
            pair.B.mul_(0.99)


def descend(model: PeftModel, steps: int, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Train the B's with projected gradients and a stock optimizer; the updates s B A after that."""
    torch.manual_seed(2)
    pairs = pairs_of(model)
    rows = RowSpace(pairs)
    optimizer = make([pair.B for pair in pairs])
    for _ in range(steps):
        model.zero_grad()
        loss(model, batch()).backward()
        for parameter, gradient in rows.gradients().items():
            parameter.grad = gradient
        optimizer.step()
        decay(pairs)
    return {pair.path: update(pair) for pair in pairs}


def sgd(parameters: list[Tensor], scale: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05 * scale, momentum=0.9, nesterov=True, weight_decay=0.0)


def test_descent_with_momentum_and_decay_depends_on_the_rows_of_A_alone() -> None:
    basis = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 0.4]], dtype=torch.float64)
    results = []
    for change in (None, basis):
        torch.manual_seed(1)
        model = adapted()
        change_basis(model, change)
        results.append(descend(model, 10, sgd))
    for path, expected in results[0].items():
        torch.testing.assert_close(results[1][path], expected, rtol=1e-10, atol=1e-12)


def test_folding_keeps_the_function_and_makes_the_rows_orthonormal() -> None:
    model, (x, _) = adapted(), batch()
    before = model(x)
    for pair in pairs_of(model):
        fold_(pair)
        eye = torch.eye(pair.A.shape[0], dtype=torch.float64)
        torch.testing.assert_close(pair.A @ pair.A.T, eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-13)


def test_folding_twice_is_folding_once_bit_for_bit() -> None:
    model = adapted(torch.float32)
    pairs = pairs_of(model)
    for pair in pairs:
        fold_(pair)
    once = [(pair.A.clone(), pair.B.clone()) for pair in pairs]
    for pair, (A, B) in zip(pairs, once, strict=True):
        fold_(pair)
        assert torch.equal(pair.A, A)
        assert torch.equal(pair.B, B)


def test_folded_descent_on_the_plain_gradient_is_descent_on_the_projected_one() -> None:
    """With orthonormal rows the projection is the number 1/s^2, which a learning rate can hold."""
    torch.manual_seed(1)
    expected = descend(adapted(), 10, sgd)
    torch.manual_seed(1)
    model = adapted()
    pairs = pairs_of(model)
    for pair in pairs:
        fold_(pair)
    torch.manual_seed(2)
    optimizer = sgd([pair.B for pair in pairs], 1 / pairs[0].scaling ** 2)
    for _ in range(10):
        model.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
        decay(pairs)
    for pair in pairs:
        torch.testing.assert_close(update(pair), expected[pair.path], rtol=1e-9, atol=1e-11)


def diagonal_gram(model: PeftModel) -> PeftModel:
    """Orthogonal rows of A, of different lengths."""
    for pair in pairs_of(model):
        lengths = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
        pair.A.data = lengths[:, None] * torch.linalg.qr(pair.A.detach().T)[0].T
    return model


def adam_run(model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    torch.manual_seed(2)
    for _ in range(12):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
    return {pair.path: update(pair) for pair in pairs_of(model)}


def test_with_orthogonal_rows_of_A_adam_does_not_see_the_projection() -> None:
    """A rescaling of columns cancels in m / sqrt(v) as eps goes to 0."""
    torch.manual_seed(1)
    model = diagonal_gram(adapted())
    found = adam_run(model, create_lorafa_optimizer(model, lr=1e-2, eps=0.0))
    torch.manual_seed(1)
    model = diagonal_gram(adapted())
    Bs = [pair.B for pair in pairs_of(model)]
    for pair in pairs_of(model):
        pair.A.requires_grad_(False)
    expected = adam_run(model, torch.optim.AdamW(Bs, lr=1e-2, eps=0.0, weight_decay=0.0))
    for path in expected:
        torch.testing.assert_close(found[path], expected[path], rtol=1e-11, atol=1e-13)


def test_exact_and_fold_coincide_for_orthonormal_rows_and_differ_for_others() -> None:
    """eps in exact's units is eps s^2 in fold's."""

    def runs(orthonormal: bool) -> list[dict[str, Tensor]]:
        found = []
        for algorithm in ("exact", "fold"):
            torch.manual_seed(1)
            model = adapted()
            for pair in pairs_of(model):
                if orthonormal:
                    pair.A.data = torch.linalg.qr(pair.A.detach().T)[0].T.contiguous()
            # without bias correction of eps on one side only: eps small beside sqrt(v)
            found.append(adam_run(model, create_lorafa_optimizer(model, lr=1e-2, eps=1e-14, algorithm=algorithm)))
        return found

    exact, fold = runs(orthonormal=True)
    for path in exact:
        torch.testing.assert_close(fold[path], exact[path], rtol=1e-6, atol=1e-9)
    exact, fold = runs(orthonormal=False)
    assert any(float((fold[path] - exact[path]).norm() / exact[path].norm()) > 0.01 for path in exact)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.7, 0.9)], ids=str)
def test_a_step_is_the_documented_one(betas: tuple[float, float], correct_bias: bool) -> None:
    """Three steps of the documented algorithm, written out."""
    model = adapted()
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2, "betas": betas, "correct_bias": correct_bias}
    optimizer = create_lorafa_optimizer(model, 3, 5.0, **settings)
    pairs = pairs_of(model)
    expected = {pair: pair.B.detach().clone() for pair in pairs}
    m = {pair: torch.zeros_like(pair.B) for pair in pairs}
    v = {pair: torch.zeros_like(pair.B) for pair in pairs}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        for pair in pairs:
            g = pair.B.grad @ torch.linalg.inv(pair.A @ pair.A.T) * (pair.layer.r["default"] / 5.0) ** 2
            m[pair] = betas[0] * m[pair] + (1 - betas[0]) * g
            v[pair] = betas[1] * v[pair] + (1 - betas[1]) * g * g
            size = 0.1 * ((1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step) if correct_bias else 1.0)
            expected[pair] = expected[pair] - size * m[pair] / (v[pair].sqrt() + 1e-6)
            expected[pair] = expected[pair] - 0.1 * 0.2 * expected[pair]
        optimizer.step()
        for pair in pairs:
            torch.testing.assert_close(pair.B.detach(), expected[pair].detach(), rtol=1e-10, atol=1e-12)
    assert isinstance(optimizer, LoraFAOptimizer)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_fold_is_torchs_adamw_on_the_projected_gradient_in_an_orthonormal_basis(orthonormal: bool) -> None:
    """A = L Q: G Q^T / s is its gradient, and eps is in the units of that one, so large here that it counts."""
    model, betas, eps, lr, decay = adapted(use_rslora=True, alpha_pattern={"first": 9.0}), (0.7, 0.9), 1e-3, 0.05, 0.2
    pairs = pairs_of(model)
    scalings = [9.0 / 3**0.5, 5.0 / 3**0.5]
    Q, expected = {}, {}
    for pair in pairs:
        if orthonormal:
            pair.A.data = torch.linalg.qr(pair.A.detach().T)[0].T.contiguous()
        L = torch.linalg.cholesky(pair.A.detach() @ pair.A.detach().T)
        Q[pair], expected[pair] = torch.linalg.inv(L) @ pair.A.detach(), pair.B.detach() @ L
    optimizer = create_lorafa_optimizer(
        model, lr=lr, algorithm="fold", betas=betas, eps=eps, weight_decay=decay, use_rslora=True
    )
    m = {pair: torch.zeros_like(pair.B) for pair in pairs}
    v = {pair: torch.zeros_like(pair.B) for pair in pairs}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        G = weight_gradients(model, batch())
        for pair, s in zip(pairs, scalings, strict=True):
            g = G[pair.path] @ Q[pair].T / s
            m[pair] = betas[0] * m[pair] + (1 - betas[0]) * g
            v[pair] = betas[1] * v[pair] + (1 - betas[1]) * g * g
            root = (v[pair] / (1 - betas[1] ** step)).sqrt() + eps
            expected[pair] = (1 - lr * decay) * expected[pair] - lr * m[pair] / (1 - betas[0] ** step) / root
        optimizer.step()
        for pair in pairs:
            torch.testing.assert_close(pair.A.detach(), Q[pair], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(pair.B.detach(), expected[pair].detach(), rtol=1e-9, atol=1e-11)


def rescale(model: PeftModel, scale: float) -> None:
    for pair in pairs_of(model):
        pair.layer.set_scale("default", scale)


@pytest.mark.parametrize("algorithm", ["exact", "fold"])
def test_a_scaling_that_is_changed_later_gives_the_step_of_the_new_one(algorithm: str) -> None:
    """As if the optimizer had been made with it; but fold converts eps, which is 0 here, when it is made."""
    eps, results = {"exact": 1e-2, "fold": 0.0}[algorithm], []
    for scale_when_made in (3.0, 1.0):
        torch.manual_seed(1)
        model = adapted()
        rescale(model, scale_when_made)
        optimizer = create_lorafa_optimizer(model, lr=0.1, eps=eps, algorithm=algorithm)
        rescale(model, 3.0)
        results.append(adam_run(model, optimizer))
    for path, expected in results[0].items():
        torch.testing.assert_close(results[1][path], expected, rtol=1e-11, atol=1e-13)


def test_decay_by_all_of_B_leaves_zero() -> None:
    """(1 - lr weight_decay) = 0 comes after the step, so nothing of it is left either."""
    model = adapted()
    optimizer = create_lorafa_optimizer(model, lr=0.5, weight_decay=2.0)
    loss(model, batch()).backward()
    optimizer.step()
    assert not any(bool(pair.B.any()) for pair in pairs_of(model))


@pytest.mark.parametrize("length", [0.25, 2.0])
def test_where_rows_have_another_length_the_first_step_of_fold_is_that_of_exact_over_it(length: float) -> None:
    """Adam's step of B has the same size in every basis; what it moves the weight by is that times the rows of A."""
    moved = []
    for algorithm in ("exact", "fold"):
        torch.manual_seed(1)
        model = adapted()
        for pair in pairs_of(model):
            pair.A.data = length * torch.linalg.qr(pair.A.detach().T)[0].T.contiguous()
        before = {pair.path: update(pair) for pair in pairs_of(model)}
        optimizer = create_lorafa_optimizer(model, lr=1e-2, eps=1e-14, algorithm=algorithm)
        torch.manual_seed(2)
        loss(model, batch()).backward()
        optimizer.step()
        moved.append({pair.path: update(pair) - before[pair.path] for pair in pairs_of(model)})
    exact, fold = moved
    for path in exact:
        torch.testing.assert_close(fold[path], exact[path] / length, rtol=1e-6, atol=1e-9)
