"""Adapters on linear layers whose weight torchao has quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorafa import LoraConfig, PeftModel, collect_statistics, get_peft_model
from lorafa.backends import backend_of
from lorafa.backends.torchao import TorchaoBackend, quantized_linear
from lorafa.errors import AdapterError, TargetError
from lorafa.surgery.resolve import resolve
from toys.adapters import on_layer, only_layer
from toys.compare import close, values_of
from toys.layers import Single

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

IN, OUT = 64, 96
CONFIGS = {
    "8 bits": lambda: torchao.Int8WeightOnlyConfig(),
    "8 bits, one scale": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()),
    "4 bits": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "4 bits by group": lambda: torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=torchao.PerGroup(32), mapping_type=torchao.MappingType.ASYMMETRIC
    ),
    "2 bits": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=torchao.PerGroup(16)),
    "floats of 8 bits": lambda: torchao.Float8WeightOnlyConfig(),
}
BITS = {"8": 0.012, "4": 0.16, "2": 0.7, "f": 0.04}
"""The most that a weight of normal numbers is off, relative, by the first letter of its name."""


def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / IN**0.5


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantized_linear(weight().to(dtype), torch.ones(OUT, dtype=dtype), CONFIGS[name]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_runs_as_the_layer_alone_and_reads_values(name: str, dtype: torch.dtype) -> None:
    layer, x = made(name, dtype), torch.randn(3, 5, IN).to(dtype)
    model = get_peft_model(Single(copy.deepcopy(layer)), LoraConfig(r=4, target_modules=["layer"]))
    backend = backend_of(layer)
    assert isinstance(backend, TorchaoBackend)
    assert torch.equal(model(x), layer(x))
    W = backend.weight(layer)
    assert (W.float() - weight()).norm() / weight().norm() < BITS[name[0]]
    close(model(x), nn.functional.linear(x, W, layer.bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_weight_is_what_torchao_makes_of_the_sum(name: str, dtype: torch.dtype) -> None:
    layer = made(name, dtype)
    before, model = values_of(layer), on_layer(layer)
    delta, W = only_layer(model).adapters["default"].product(), only_layer(model).base_weight()
    merged = model.merge_and_unload().layer
    wanted = W.float() + delta
    by_hand = quantized_linear(wanted, None, CONFIGS[name]())
    assert type(merged.weight.data) is type(layer.weight.data)
    assert merged.weight.dtype is dtype
    found, expected = (one.weight.dequantize().float() for one in (merged, by_hand))
    close(found, expected, 1e-4 if dtype is torch.float32 else 2e-2)
    assert values_of(layer).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in values_of(layer).items())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_values_and_only_x_and_the_thin_product_are_kept(name: str) -> None:
    model = on_layer(made(name)).train()
    layer, x = only_layer(model), torch.randn(7, IN, requires_grad=True)
    adapter, grad, kept = layer.adapters["default"], torch.randn(7, OUT), list[Tensor]()
    with saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = model(x)
    y.backward(grad)
    close(x.grad, grad @ (layer.base_weight() + adapter.product()), torch.float32)
    close(adapter.A.grad, adapter.scaling * (grad @ adapter.B).T @ x, torch.float32)
    close(adapter.B.grad, adapter.scaling * grad.T @ (x @ adapter.A.T), torch.float32)
    sizes = {tuple(one.shape) for one in kept}
    assert sizes == {(7, IN), (7, 4), tuple(adapter.A.shape), tuple(adapter.B.shape)}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_saved_and_comes_back_and_statistics_are_collected(name: str, tmp_path: Path) -> None:
    layer, x = made(name), torch.randn(3, IN)
    model = on_layer(copy.deepcopy(layer)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Single(layer), tmp_path)(x), model(x))
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights="eva")
    stats = collect_statistics(Single(layer), resolve(Single(layer), config), [x.repeat(4, 1)], cache=tmp_path / "s")
    assert stats["layer"]


@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_weights_that_round_their_inputs_are_refused(name: str) -> None:
    layer: Any = quantized_linear(weight(), None, getattr(torchao, name)())
    with pytest.raises(TargetError, match=r"'layer'.* rounds or scales its inputs too .* quantize the weight alone"):
        get_peft_model(Single(layer), LoraConfig(r=4, target_modules=["layer"]))


def test_a_quantized_table_is_refused_by_name() -> None:
    table = nn.Embedding(OUT, IN)
    table.weight = made("8 bits").weight
    with pytest.raises(TargetError, match=r"'layer'.* Int8Tensor of torchao, which is known in linear layers only"):
        get_peft_model(Single(table), LoraConfig(r=4, target_modules=["layer"]))


def test_a_merged_weight_that_is_not_finite_is_refused() -> None:
    model = on_layer(made("8 bits"))
    with torch.no_grad():
        only_layer(model).lora_A["default"].weight.fill_(1e30)
        only_layer(model).lora_B["default"].weight.fill_(1e30)
    with pytest.raises(AdapterError, match="gives inf or nan in a Linear"):
        model.merge_adapter()
