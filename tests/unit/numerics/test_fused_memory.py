"""What the fused path keeps for backward, counted in bytes: x as it came, the low-rank product, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafa.numerics.fused import low_rank_linear
from toys.watch import Kept

T, WIDE, R = 64, 96, 4


def layer(dtype: torch.dtype, *, train_A: bool = True) -> dict[str, Tensor]:
    factors = torch.float32
    return {
        "weight": torch.randn(WIDE, WIDE).to(dtype),
        "bias": torch.randn(WIDE).to(dtype),
        "A": torch.randn(R, WIDE, dtype=factors).requires_grad_(train_A),
        "B": torch.randn(WIDE, R, dtype=factors).requires_grad_(),
    }


def call(x: Tensor, t: dict[str, Tensor], dropout: float = 0.0, **more: Tensor) -> Tensor:
    return low_rank_linear(x, t["A"], t["B"], 2.0, weight=t["weight"], bias=t["bias"], dropout=dropout, **more)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kept_are_x_itself_and_the_low_rank_product(dtype: torch.dtype, dropout: float) -> None:
    """No copy of x in another dtype, no dropped copy, no mask."""
    t, x = layer(dtype), torch.randn(T, WIDE).to(dtype).requires_grad_()
    with Kept(*t.values()) as kept:
        call(x, t, dropout)
    assert x.untyped_storage().data_ptr() in kept.storages
    assert kept.bytes == (T * WIDE + T * R) * dtype.itemsize
    assert {kind for _, kind in kept.storages.values()} == {dtype}


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_x_is_not_kept_when_A_is_frozen(dtype: torch.dtype, dropout: float) -> None:
    t, x = layer(dtype, train_A=False), torch.randn(T, WIDE).to(dtype).requires_grad_()
    with Kept(*t.values()) as kept:
        call(x, t, dropout)
    assert kept.bytes == T * R * dtype.itemsize


def test_nothing_but_the_low_rank_product_is_kept_when_only_B_trains_and_nothing_when_nothing_does() -> None:
    t, x = layer(torch.float32, train_A=False), torch.randn(T, WIDE)
    with Kept(*t.values()) as kept:
        call(x, t)
    assert kept.bytes == T * R * 4
    t["B"].requires_grad_(False)
    with Kept(*t.values()) as kept:
        call(x, t)
        call(x.requires_grad_(), t)
    assert kept.bytes == 0


def test_query_key_and_value_keep_the_x_they_share_once() -> None:
    x = torch.randn(2, T // 2, WIDE, dtype=torch.bfloat16).requires_grad_()
    layers = [layer(torch.bfloat16) for _ in range(3)]
    with Kept(*(value for t in layers for value in t.values())) as kept:
        for t in layers:
            call(x, t, 0.05)
    assert kept.bytes == (T * WIDE + 3 * T * R) * 2


def test_gain_keeps_itself_as_it_is_applied_and_one_output_more_only_if_it_trains() -> None:
    t, x = layer(torch.bfloat16), torch.randn(T, WIDE).bfloat16().requires_grad_()
    for trained in (True, False):
        gain = torch.randn(WIDE).requires_grad_(trained)
        with Kept(*t.values(), gain) as kept:
            call(x, t, gain=gain)
        assert kept.bytes == (T * WIDE * (2 if trained else 1) + T * R + WIDE) * 2


def test_autocast_keeps_x_once_as_it_came() -> None:
    t, x = layer(torch.float32), torch.randn(T, WIDE).requires_grad_()
    with Kept(*t.values()) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        call(x, t, 0.05)
    assert kept.bytes == T * WIDE * 4 + T * R * 2
