"""What the fused path keeps of its input is up to the caller, and is all that the gradient of A is made from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorafa.numerics.fused import AS_IT_IS, low_rank_linear


class FirstColumns:
    """Keeps the first two columns of x; the others count as zero."""

    def save(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x[..., :2].clone(),)

    def load(self, saved: tuple[Tensor, ...]) -> Tensor:
        return torch.nn.functional.pad(saved[0], (0, 5))


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, A, B, W = (torch.randn(size, dtype=torch.float64) for size in ((4, 6, 7), (3, 7), (5, 3), (5, 7)))
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), W


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_of_A_is_taken_with_what_was_kept_and_no_other_changes(dropout: float) -> None:
    x, A, B, W = tensors()
    found = []
    for keep in (None, AS_IT_IS, FirstColumns()):
        torch.manual_seed(3)
        y = low_rank_linear(x, A, B, 1.5, weight=W, dropout=dropout, keep=keep)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, A, B))))
    for exact in (found[1], found[2]):
        for index in (0, 1, 3):
            assert torch.equal(exact[index], found[0][index])
    assert torch.equal(found[1][2], found[0][2])
    torch.testing.assert_close(found[2][2][:, :2], found[0][2][:, :2], rtol=1e-12, atol=1e-12)
    assert bool((found[2][2][:, 2:] == 0).all())


def test_nothing_else_of_the_input_is_kept() -> None:
    x, A, B, W = tensors()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        low_rank_linear(x, A, B, 1.5, weight=W, keep=FirstColumns())
    assert [tensor.shape for tensor in saved if tensor.shape[:-1] == (4, 6)] == [(4, 6, 2)]
    assert not any(tensor.numel() >= x.numel() and tensor is not W for tensor in saved if tensor.shape != W.shape)


def test_where_the_weight_is_trained_its_gradient_stays_exact() -> None:
    x, A, B, W = tensors()
    W.requires_grad_()
    wanted = torch.autograd.grad(low_rank_linear(x, A, B, 1.5, weight=W).square().sum(), W)
    kept = torch.autograd.grad(low_rank_linear(x, A, B, 1.5, weight=W, keep=FirstColumns()).square().sum(), W)
    assert torch.equal(kept[0], wanted[0])


def test_the_input_is_kept_as_it_came() -> None:
    x = torch.randn(3, 7)
    assert AS_IT_IS.save(x)[0] is x
    assert AS_IT_IS.load((x,)) is x
