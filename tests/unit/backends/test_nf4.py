"""Our own 4-bit linear layer against QLoRA (arXiv:2305.14314)."""

from __future__ import annotations

import pytest
import torch

from lorafa.backends.nf4 import BLOCK, NF4Linear, normal_float_levels

APPENDIX_E = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The table printed in appendix E of the paper."""


def test_levels_are_the_published_ones() -> None:
    torch.testing.assert_close(normal_float_levels(), torch.tensor(APPENDIX_E), rtol=0, atol=1e-6)


def test_a_weight_made_of_levels_comes_back_exactly() -> None:
    scales = torch.tensor([0.5, 2.0, 3.0, 0.125]).repeat_interleave(BLOCK)
    levels = normal_float_levels()
    codes = torch.cat([torch.cat([torch.arange(16), torch.randint(16, (BLOCK - 16,))]) for _ in range(4)])
    weight = (levels[codes] * scales).view(8, 32)
    assert torch.equal(NF4Linear(weight).dequantize(), weight)


def test_error_is_at_most_half_the_largest_gap_times_the_largest_entry_of_the_block() -> None:
    weight = torch.randn(64, 128)
    error = (NF4Linear(weight).dequantize() - weight).abs().view(-1, BLOCK)
    largest = weight.view(-1, BLOCK).abs().amax(1, keepdim=True)
    half_gap = torch.tensor(APPENDIX_E).diff().max() / 2
    assert (error <= half_gap * largest + 1e-6).all()


def test_every_entry_gets_its_nearest_level() -> None:
    weight = torch.randn(16, 64)
    scaled = weight / weight.view(16, -1).abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - torch.tensor(APPENDIX_E)).abs().min(-1).values
    stored = NF4Linear(weight).dequantize() / weight.abs().amax(1, keepdim=True)
    torch.testing.assert_close((stored - scaled).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 64), (5, 33)])
def test_sizes_that_are_no_multiple_of_a_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    layer = NF4Linear(weight)
    assert layer.dequantize().shape == shape
    assert (layer.dequantize() - weight).abs().max() <= 0.16 * weight.abs().max()


def test_zero_weight_stays_zero() -> None:
    assert not NF4Linear(torch.zeros(8, 16)).dequantize().any()


def test_memory_is_half_a_byte_a_weight_and_four_bytes_a_block() -> None:
    layer = NF4Linear(torch.randn(256, 256))
    stored = sum(value.nbytes for value in layer.state_dict().values())
    assert stored == 256 * 256 // 2 + 4 * 256 * 256 // BLOCK
