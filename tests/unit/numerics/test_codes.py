"""A frozen weight as codes in the fused function: what it computes and differentiates is what a dense one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa.numerics.fused import frozen_linear, low_rank_linear
from toys.compare import close

OUT, IN, RANK = 6, 8, 3


class Halved:
    """Codes of a kind: twice the weight is kept."""

    def __init__(self, weight: Tensor) -> None:
        self.twice = 2 * weight
        self.made: list[torch.dtype] = []

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype), bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        self.made.append(dtype)
        return (self.twice / 2).to(dtype)


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [(), ("A",), ("x",), ("x", "A", "B")], ids=str)
def test_outputs_and_gradients_are_those_of_the_dense_weight(
    frozen: tuple[str, ...], with_bias: bool, with_gain: bool, dropout: float
) -> None:
    W, found = torch.randn(OUT, IN, dtype=torch.float64), []
    given = tensors(x=(2, 5, IN), A=(RANK, IN), B=(OUT, RANK), bias=(OUT,), gain=(OUT,))
    for name in frozen:
        given[name].requires_grad_(False)
    kept = {"bias": given["bias"] if with_bias else None, "gain": given["gain"] if with_gain else None}
    for weight in (W, Halved(W)):
        torch.manual_seed(0)
        y = low_rank_linear(given["x"], given["A"], given["B"], 1.5, weight=weight, dropout=dropout, **kept)
        trained = [one for one in given.values() if one.requires_grad]
        grads = torch.autograd.grad(y.sin().sum(), trained, allow_unused=True) if y.requires_grad else ()
        found.append([y, *(one for one in grads if one is not None)])
    assert len(found[0]) == len(found[1])
    for dense, codes in zip(*found, strict=True):
        close(codes, dense, 1e-12)


def test_where_x_needs_no_gradient_the_weight_is_made_once() -> None:
    given, codes = tensors(A=(RANK, IN), B=(OUT, RANK)), Halved(torch.randn(OUT, IN))
    low_rank_linear(torch.randn(5, IN), given["A"], given["B"], 1.0, weight=codes).sum().backward()
    assert codes.made == [torch.float32]
    low_rank_linear(torch.randn(5, IN, requires_grad=True), given["A"], given["B"], 1.0, weight=codes).sum().backward()
    assert codes.made == [torch.float32] * 3


def test_few_rows_and_transformed_functions_take_codes_too() -> None:
    W, x = torch.randn(OUT, IN), torch.randn(2, IN)
    A, B = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    wanted = x.bfloat16().float() @ W.bfloat16().float().T + x.bfloat16().float() @ A.T @ B.T
    with torch.no_grad():
        close(low_rank_linear(x.bfloat16(), A, B, 1.0, weight=Halved(W)).float(), wanted, torch.bfloat16)
    by_rows = torch.func.vmap(lambda row: low_rank_linear(row, A, B, 1.0, weight=Halved(W)))
    close(by_rows(x), x @ (W + B @ A).T, torch.float32)


def test_a_frozen_product_has_the_gradients_of_its_input_and_its_bias_and_keeps_nothing() -> None:
    given, W, kept = tensors(x=(2, 5, IN), bias=(OUT,)), torch.randn(OUT, IN, dtype=torch.float64), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = frozen_linear(given["x"], Halved(W), given["bias"])
    assert kept == []
    grad = torch.randn_like(y)
    y.backward(grad)
    close(y, given["x"] @ W.T + given["bias"], 1e-12)
    close(given["x"].grad, grad @ W, 1e-12)
    close(given["bias"].grad, grad.sum((0, 1)), 1e-12)
