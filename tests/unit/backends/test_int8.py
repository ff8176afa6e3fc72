"""Our own 8-bit linear layer: one scale an output row."""

from __future__ import annotations

import pytest
import torch

from lorafa.backends.int8 import Int8Linear


def test_a_weight_made_of_codes_comes_back_exactly() -> None:
    codes = torch.randint(-127, 128, (8, 32)).float()
    codes[:, 0] = 127
    weight = codes * torch.tensor([2.0**k for k in range(-4, 4)])[:, None]
    assert torch.equal(Int8Linear(weight).dequantize(), weight)
    assert torch.equal(Int8Linear(-weight).dequantize(), -weight)


def test_error_is_at_most_half_a_step_of_the_row() -> None:
    weight = torch.randn(64, 128) * torch.logspace(-3, 3, 64)[:, None]
    error = (Int8Linear(weight).dequantize() - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert (error <= step / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 64)])
def test_rows_of_zeros_stay_zero_whatever_the_size(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[0] = 0
    stored = Int8Linear(weight).dequantize()
    assert stored.shape == shape
    assert not stored[0].any()


def test_memory_is_a_byte_a_weight_and_four_bytes_a_row() -> None:
    layer = Int8Linear(torch.randn(256, 128))
    assert sum(value.nbytes for value in layer.state_dict().values()) == 256 * 128 + 4 * 256
