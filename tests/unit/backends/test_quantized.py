"""Our own quantized linear layers against the dense layers they stand for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.backends.int8 import Int8Linear
from lorafa.backends.nf4 import NF4Linear
from lorafa.backends.quantized import QuantizedLinear
from toys.watch import Kept


@pytest.fixture(params=[NF4Linear, Int8Linear])
def kind(request: pytest.FixtureRequest) -> type[QuantizedLinear]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward_and_input_gradient_are_those_of_the_dequantized_weight(
    kind: type[QuantizedLinear], dtype: torch.dtype
) -> None:
    layer = kind(torch.randn(12, 20), torch.randn(12))
    x, y = (torch.randn(3, 5, 20).to(dtype).requires_grad_() for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    out = layer(x)
    wanted = nn.functional.linear(y, layer.dequantize(dtype), layer.bias.to(dtype))
    assert out.dtype is dtype
    assert torch.equal(out, wanted)
    probe = torch.randn_like(out)
    out.backward(probe)
    wanted.backward(probe)
    torch.testing.assert_close(x.grad, y.grad)


def test_bias_gets_its_gradient_when_it_trains(kind: type[QuantizedLinear]) -> None:
    layer = kind(torch.randn(12, 20), torch.randn(12))
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 5, 20)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((12,), 15.0))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    with Kept(*model.parameters(), *model.buffers()) as kept:
        model(x)
    return kept.bytes


def test_nothing_dequantized_is_kept_for_backward(kind: type[QuantizedLinear]) -> None:
    model = nn.Sequential(kind(torch.randn(256, 256), torch.randn(256)))
    x = torch.randn(4, 256, requires_grad=True)
    assert saved_bytes(model, x) == 0
    peft = get_peft_model(model, LoraConfig(target_modules=["0"], r=4))
    assert saved_bytes(peft, x) <= x.nbytes + 4 * 4 * 4  # x itself and the low-rank product


SETTINGS: list[dict[str, object]] = [
    {}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_dora": True, "init_lora_weights": "pissa"},
    {"lora_bias": True}, {"lora_dropout": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_adapters_on_it_train_as_on_the_dequantized_layer(
    kind: type[QuantizedLinear], settings: dict[str, object]
) -> None:
    quantized = kind(torch.randn(12, 20) / 5, torch.randn(12))
    dense = nn.Linear(20, 12)
    with torch.no_grad():
        dense.weight.copy_(quantized.dequantize())
        dense.bias.copy_(quantized.bias)
    x = torch.randn(6, 20)
    gradients = []
    outputs = []
    for layer in (quantized, dense):
        model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=4, init_seed=0, **settings))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        inputs = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = model(inputs)
        y.square().sum().backward()
        outputs.append(y)
        gradients.append([inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_merging_rounds_the_sum_to_codes_and_unmerging_brings_the_codes_back(kind: type[QuantizedLinear]) -> None:
    layer = kind(torch.randn(16, 64))
    codes, scale = layer.codes.clone(), layer.scale.clone()
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    wanted = layer.dequantize() + model.get_base_model()[0].get_delta_weight("default")
    model.merge_adapter()
    merged = model.get_base_model()[0].get_base_layer()
    assert isinstance(merged, kind)
    assert torch.equal(merged.dequantize(), kind(wanted).dequantize())
    model.unmerge_adapter()
    assert model.get_base_model()[0].get_base_layer() is layer
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.scale, scale)


def test_layer_survives_deepcopy_pickle_and_state_dict(kind: type[QuantizedLinear]) -> None:
    layer = kind(torch.randn(12, 20), torch.randn(12))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    empty = kind(torch.zeros(12, 20), torch.zeros(12))
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(3, 20)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), empty):
        assert torch.equal(twin(x), layer(x))


def test_from_linear_takes_weight_and_bias(kind: type[QuantizedLinear]) -> None:
    dense = nn.Linear(64, 8)
    layer = kind.from_linear(dense)
    assert (layer.in_features, layer.out_features) == (64, 8)
    assert torch.equal(layer.bias, dense.bias)
    assert repr(layer) == f"{kind.__name__}(in_features=64, out_features=8, bias=True)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_the_model_does_not_change_the_weight(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    layer = kind(torch.randn(16, 64))
    weight = layer.dequantize()
    assert torch.equal(layer.to(dtype).dequantize(torch.float32), weight)


def test_adapter_saved_on_it_comes_back(kind: type[QuantizedLinear], tmp_path: object) -> None:
    weight = torch.randn(12, 20)
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(kind(weight)), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(kind(weight)), tmp_path)
    x = torch.randn(3, 20)
    assert torch.equal(again(x), model(x))
