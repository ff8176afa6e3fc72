"""Statistics and starts of GPT-2's Conv1D, which keeps its weight as (in, out): the same as those of a linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafa import LoraConfig, PeftModel, collect_statistics, get_peft_model
from toys.calibration import gradient_matrix

OUT, IN, RANK = 12, 20, 3
DATA = list(torch.randn(3, 2, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
STARTS = ("lora_ga", "lora_ga_peft", "lora_one", "functional", "gora", "lora_sb", "eva", "corda", "lora_null")
"""That read statistics."""


class Model(nn.Module):
    """Two layers of (OUT, IN) and (OUT, OUT), as Conv1D or with the same weights as nn.Linear."""

    def __init__(self, *, conv1d: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        layers: list[nn.Module] = []
        for in_ in (IN, OUT):
            weight = torch.randn(OUT, in_, dtype=torch.float64, generator=generator) / in_**0.5
            layer: Any = Conv1D(OUT, in_) if conv1d else nn.Linear(in_, OUT)
            layer.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight)
            layer.bias = nn.Parameter(torch.randn(OUT, dtype=torch.float64, generator=generator))
            layers.append(layer)
        self.first, self.second = layers

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return (y * y.sin()).mean()


def config(start: str) -> LoraConfig:
    return LoraConfig(target_modules=["first", "second"], r=RANK, init_lora_weights=start, init_seed=0)


@pytest.mark.parametrize("dense", [True, False])
def test_the_gradient_of_a_conv1d_is_autograds_as_out_by_in(dense: bool) -> None:
    """A sketch is exact here: 2 k + 1 rows and columns are as many as the matrix has."""
    model = Model(conv1d=True)
    stats = collect_statistics(model, config("lora_one"), DATA, loss=loss, dense=dense)
    assert all(p.grad is None for p in model.parameters())
    for x in DATA:
        (loss(model, x) / len(DATA)).backward()  # type: ignore[no-untyped-call]
    for name in ("first", "second"):
        expected = model.get_submodule(name).weight.grad.T  # type: ignore[union-attr, operator]
        assert ("gradient.dense" in stats[name]) is dense
        torch.testing.assert_close(gradient_matrix(stats[name]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start", STARTS)
def test_a_conv1d_starts_where_the_linear_layer_of_its_weight_does(start: str) -> None:
    found: list[PeftModel] = []
    for conv1d in (True, False):
        model = Model(conv1d=conv1d)
        stats = collect_statistics(model, config(start), DATA, loss=loss)
        found.append(get_peft_model(model, config(start), stats=stats))
    for name in ("first", "second"):
        layers = [peft.get_base_model().get_submodule(name) for peft in found]
        assert not layers[0].fallbacks
        first, second = ([layer.factor_A("default"), layer.factor_B("default")] for layer in layers)  # type: ignore[operator]
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)
    for x in DATA:
        torch.testing.assert_close(found[0](x), found[1](x), rtol=1e-8, atol=1e-10)
