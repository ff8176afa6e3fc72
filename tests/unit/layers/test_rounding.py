"""Half precision and autocast round once, at the end: gains, starts and weights are not computed in 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, get_peft_model


def wrapped(dtype: torch.dtype, size: int = 128, autocast: bool = True, **config: object) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size)).to(dtype)
    settings = LoraConfig(target_modules=["0"], r=8, **config)  # type: ignore[arg-type]
    return get_peft_model(base, settings, autocast_adapter_dtype=autocast)


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]  # type: ignore[union-attr,index,return-value]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("change", [1.003, 1.005, 0.997])
def test_a_small_change_of_doras_magnitude_changes_a_bfloat16_output_by_as_much(change: float, hooked: bool) -> None:
    model = wrapped(torch.bfloat16, use_dora=True).eval()
    layer = layer_of(model)
    if hooked:  # the fused path steps aside
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(512, 128, dtype=torch.bfloat16)
    bias = layer.base_layer.bias.float()
    before = model(x).float() - bias
    layer.lora_magnitude_vector["default"].weight.data.mul_(change)
    after = model(x).float() - bias
    ratio = (after * before).sum() / before.square().sum()
    assert abs(ratio - change) < 1e-3  # a bfloat16 gain is off by up to 4e-3


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("path", ["fused", "hooked", "autocast"])
def test_a_small_move_away_from_a_pissa_start_survives_half_precision(path: str, use_dora: bool) -> None:
    dtype = torch.float32 if path == "autocast" else torch.bfloat16
    model = wrapped(dtype, init_lora_weights="pissa", use_dora=use_dora, lora_alpha=8).eval()
    layer = layer_of(model)
    adapter = layer.adapters["default"]
    with torch.no_grad():
        for factor in (adapter.A, adapter.B):
            factor.add_(1e-3 * factor.abs().mean() * torch.randn_like(factor))
        exact = copy.deepcopy(layer).double()
        x = torch.randn(256, 128).to(dtype)
        expected = exact(x.double()) - exact.base_layer(x.double())
        if path == "hooked":
            layer.base_layer.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=path == "autocast"):
            found = adapter.delta_output(x, layer.base_layer(x)).double()
    assert (found - expected).norm() < 0.02 * expected.norm() + 2e-3 * exact.base_layer(x.double()).norm() * use_dora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_made_of_factors_in_half_precision_and_their_start_is_computed_in_float32(dtype: torch.dtype) -> None:
    """B A - B0 A0 of the rounded factors: their differences have more digits than they have."""
    model = wrapped(dtype, init_lora_weights="pissa", lora_alpha=8, autocast=False)
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=2))
    layer = layer_of(model)
    adapter = layer.adapters["default"]
    assert adapter.A.dtype is adapter.start.A.dtype is dtype
    with torch.no_grad():
        for factor in (adapter.A, adapter.B):
            factor.add_(0.3 * factor.abs().mean() * torch.randn_like(factor))
        A, B, A0, B0 = (factor.double() for factor in (adapter.A, adapter.B, adapter.start.A, adapter.start.B))
        wanted = adapter.scaling * (B @ A - B0 @ A0)
        merged = layer.merged_weight(["default"]) - layer.base_weight().double()
        model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum", "cat")
        found = {"product": adapter.product(), "combined": layer.adapters["sum"].product()}
    for update in found.values():
        assert float((update.double() - wanted).norm() / wanted.norm()) < 1e-6
    assert float((merged - wanted).norm() / layer.base_weight().double().norm()) < 1e-6


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_inside_autocast_gives_the_bits_of_merging_outside(use_dora: bool, init: bool | str) -> None:
    model = wrapped(torch.float32, use_dora=use_dora, init_lora_weights=init)
    nn.init.normal_(layer_of(model).lora_B["default"].weight)
    model.merge_adapter()
    outside = layer_of(model).base_layer.weight.clone()
    model.unmerge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.merge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, outside)


def test_doras_gain_is_one_at_step_zero_inside_autocast_and_in_half_precision_magnitudes() -> None:
    for dtype, autocast_adapters in ((torch.float32, True), (torch.bfloat16, False)):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
        config = LoraConfig(target_modules=["0"], r=4, use_dora=True)
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast_adapters)
        x = torch.randn(8, 64, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)


def test_an_expert_parameter_keeps_its_dtype_inside_autocast() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table

    base = nn.Sequential(Scaled())
    x = torch.randn(3, 8, 8)
    before = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=["table"], r=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_backward_inside_autocast_follows_a_forward_outside(use_dora: bool) -> None:
    model = wrapped(torch.float32, use_dora=use_dora)
    nn.init.normal_(layer_of(model).lora_B["default"].weight)
    x = torch.randn(4, 128, requires_grad=True)
    model(x).square().sum().backward()
    expected = x.grad.clone()  # type: ignore[union-attr]
    x.grad = None
    loss = model(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    torch.testing.assert_close(x.grad, expected)
