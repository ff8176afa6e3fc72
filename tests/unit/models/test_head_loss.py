"""The loss at the head: its gradients, taken in the forward pass, are those of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa.models.head_loss import LogitTransform, _HeadLoss


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.7), LogitTransform(1.3, 0.9)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_pass_gradcheck(transform: LogitTransform, has_bias: bool) -> None:
    torch.manual_seed(0)
    rows, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets = torch.tensor([0, 6, 3, 3, 1])

    def loss(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _HeadLoss.apply(rows, weight, bias, targets, transform, 2, True)

    assert torch.autograd.gradcheck(loss, (rows, weight, bias))


@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_after_the_last_target_count_for_nothing(has_bias: bool) -> None:
    torch.manual_seed(0)
    rows, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 7))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets, wanted = torch.tensor([0, 6, 3]), [tensor for tensor in (rows, weight, bias) if tensor is not None]

    def loss(rows: Tensor) -> Tensor:
        return _HeadLoss.apply(rows, weight, bias, targets, LogitTransform(1.3, 0.9), 2, True)

    plain, filled = loss(rows), loss(nn.functional.pad(rows, (0, 0, 0, 3)))
    torch.testing.assert_close(filled, plain, rtol=1e-14, atol=0)
    for one, other in zip(torch.autograd.grad(filled, wanted), torch.autograd.grad(plain, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_second_derivative_raises_instead_of_being_wrong() -> None:
    rows, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    total = _HeadLoss.apply(rows, weight, None, torch.tensor([0, 1, 2]), LogitTransform(), 2, True)
    (grad,) = torch.autograd.grad(total**2, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_scale_that_arrives_late_is_not_lost_in_half_precision() -> None:
    """The stored gradient is of order one, so fp16 loss scaling acts before anything can underflow."""
    rows, weight = torch.randn(4, 8, dtype=torch.float16, requires_grad=True), torch.randn(19, 8, dtype=torch.float16)
    targets = torch.tensor([1, 2, 3, 4])
    total = _HeadLoss.apply(rows, weight, None, targets, LogitTransform(), 2, True)
    (total / 1e9 * 1e9).backward()  # the division alone would underflow fp16's 6e-8
    exact = rows.detach().float().requires_grad_()
    nn.functional.cross_entropy(exact @ weight.float().T, targets, reduction="sum").backward()
    torch.testing.assert_close(rows.grad.float(), exact.grad, rtol=1e-2, atol=1e-2)
