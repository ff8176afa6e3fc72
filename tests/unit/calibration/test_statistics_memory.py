"""What statistics of gradients take: far less than the gradients, while they are collected and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lorafa import LoraConfig, collect_statistics
from lorafa.calibration.base import Measured
from lorafa.calibration.gradient import CHECK_ROWS, GradientSketch

IN, OUT = 2048, 1536


def peak(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call holds at any moment, beyond those there were."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        call()
    held = largest = 0
    for event in watched.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest


@pytest.mark.parametrize("passes", [1, 4])
def test_a_wide_layers_gradient_is_never_formed(passes: int) -> None:
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    data = [torch.randn(2, 8, IN) for _ in range(2)]
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="lora_one", init_seed=0)

    def collect(dense: bool | None) -> None:
        collect_statistics(model, config, data, loss=lambda m, x: m(x).square().mean(), dense=dense, passes=passes)

    gradient = 4 * IN * OUT
    assert peak(lambda: collect(True)) > gradient
    assert peak(lambda: collect(None)) < gradient / 4


Shape = tuple[int, int, int]
"""Output and input features, and how many layers have them."""


def llama(hidden: int, kv: int, wide: int, layers: int, vocabulary: int = 32000) -> list[Shape]:
    """The linear layers of Llama 2 (arXiv:2307.09288)."""
    attention = [(hidden, hidden, 2), (kv, hidden, 2)]  # q and o, k and v
    feed_forward = [(wide, hidden, 2), (hidden, wide, 1)]  # gate and up, down
    return [*((out, in_, count * layers) for out, in_, count in attention + feed_forward), (vocabulary, hidden, 1)]


MODELS = {
    "Llama-2-7B": (llama(4096, 4096, 11008, 32), 6_607_077_376, 0.02),
    "Llama-2-70B": (llama(8192, 1024, 28672, 80), 68_713_185_280, 0.01),
}
"""Layers, their weights in all, and the share of as many float32 numbers that statistics may take."""


def after_a_batch(out: int, in_: int, rank: int) -> list[Tensor]:
    """Accumulators of a sketch in the shapes they have, on a device without memory."""
    sketch = GradientSketch(Measured("layer", out, in_, rank))
    sketch.start_pass(0, {})
    sketch.start_batch(0)
    x = torch.empty(3, in_, dtype=torch.bfloat16, device="meta")
    sketch.update(x, x.new_empty(3, out))
    return sketch.sums()


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_a_large_model_are_a_hundredth_of_its_gradients(name: str) -> None:
    """At r = 8: k = 4 r columns of G Omega and 8 r + 1 rows of Psi G, with the ten that tell the error."""
    shapes, weights, share = MODELS[name]
    assert sum(out * in_ * count for out, in_, count in shapes) == weights
    held = kept = 0
    for out, in_, count in shapes:
        sums = after_a_batch(out, in_, rank=8)
        assert [(tuple(t.shape), t.dtype) for t in sums] == [
            ((out, 32), torch.float32),
            ((65 + CHECK_ROWS, in_), torch.float32),
        ]
        held += count * sum(tensor.nbytes for tensor in sums)
        kept += count * 4 * 32 * (out + in_ + 1)  # U, S and Vh
    assert kept < held <= share * 4 * weights
