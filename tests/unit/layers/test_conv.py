"""Adapters on convolutions of every shape: the output is that of the updated kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorafa import get_peft_model_state_dict
from lorafa.errors import BackendError, ConfigError
from toys.adapters import on_layer, only_layer
from toys.compare import close

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "one tap": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": 2},
    "padding": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same, even kernel": {"kernel_size": 4, "padding": "same"},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "replicate, same": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    "no bias": {"kernel_size": 3, "bias": False},
}
METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora over pissa": {"use_dora": True, "init_lora_weights": "pissa"},
}


def picture(dims: int, channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, *(7, 6, 5)[:dims], dtype=torch.float64)


@pytest.mark.matrix(4)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("conv", SETTINGS)
@pytest.mark.parametrize("dims", CONVS)
def test_output_is_that_of_the_updated_kernel(dims: int, conv: str, method: str) -> None:
    layer = CONVS[dims](4, 6, dtype=torch.float64, **SETTINGS[conv])
    if conv == "circular" and dims == 3:
        layer = CONVS[dims](4, 6, dtype=torch.float64, **(SETTINGS[conv] | {"stride": 1}))
    model, x = on_layer(layer, **METHODS[method]), picture(dims)
    adapter = only_layer(model).adapters["default"]
    flat = layer.weight.flatten(1)
    kernel = (flat + adapter.delta_weight(flat)).view_as(layer.weight)
    expected = layer._conv_forward(x, kernel, layer.bias)
    with torch.no_grad():
        close(model(x), expected)
        close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("dims", CONVS)
def test_input_without_a_batch_dimension(dims: int) -> None:
    for method in METHODS.values():
        model, x = on_layer(CONVS[dims](4, 6, 3, dtype=torch.float64), **method), picture(dims)
        close(model(x[0]), model(x)[0])


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_without_a_weight_run_as_the_formula(dims: int, groups: int) -> None:
    """A sees all channels; B is grouped as the base is: output channel o reads the rank channels of its group."""
    layer = CONVS[dims](4, 8, 3, groups=groups, dtype=torch.float64)
    model, x = on_layer(layer), picture(dims)
    host = only_layer(model)
    A, B = host.lora_A["default"], host.lora_B["default"]
    expected = layer(x) + 1.5 * B(A(x))
    close(model(x), expected)
    assert B.groups == groups
    assert B.weight.shape[1] == 4 // groups
    with pytest.raises(BackendError, match=f"groups={groups} has no weight that could hold this update"):
        model.merge_adapter()
    close(model(x), expected)


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_what_needs_the_weight_refuses_groups(method: str) -> None:
    with pytest.raises(BackendError, match=r"groups=2 has no weight .* need groups=1"):
        on_layer(nn.Conv1d(4, 8, 3, groups=2), **METHODS[method])


def test_orthogonal_start_refuses_groups() -> None:
    """Of a grouped B only the slice of its group counts, so that B A would not be zero."""
    with pytest.raises(ConfigError, match=r"layer: init_lora_weights='orthogonal' .* groups=2, .* another start"):
        on_layer(nn.Conv1d(4, 8, 3, groups=2), init_lora_weights="orthogonal")


def test_rank_must_be_a_multiple_of_the_groups() -> None:
    with pytest.raises(ConfigError, match=r"layer: rank 3 is not divisible by the convolution's groups=2"):
        on_layer(nn.Conv1d(4, 8, 3, groups=2), r=3)


def test_factors_are_stored_as_peft_stores_them() -> None:
    tensors = get_peft_model_state_dict(on_layer(nn.Conv2d(4, 6, (3, 2)), use_dora=True))
    assert {key.removeprefix("base_model.model.layer."): tuple(value.shape) for key, value in tensors.items()} == {
        "lora_A.weight": (4, 4, 3, 2),
        "lora_B.weight": (6, 4, 1, 1),
        "lora_magnitude_vector": (1, 6, 1, 1),
    }


def test_lora_bias_is_added_to_every_place() -> None:
    model, x = on_layer(nn.Conv2d(4, 6, 3, dtype=torch.float64), lora_bias=True), picture(2)
    host = only_layer(model)
    expected = host.base_layer(x) + 1.5 * host.lora_B["default"](host.lora_A["default"](x))
    close(model(x), expected)
    close(model.merge_and_unload()(x), expected)


def test_dropout_acts_on_the_input_of_A_alone() -> None:
    model, x = on_layer(nn.Conv1d(4, 6, 1, dtype=torch.float64), lora_dropout=0.5), picture(1)
    host = only_layer(model)
    close(model.eval()(x), host.base_layer(x) + 1.5 * host.lora_B["default"](host.lora_A["default"](x)))
    model.train()
    assert not torch.allclose(model(x), model(x))
    nn.init.zeros_(host.lora_B["default"].weight)
    close(model(x), host.base_layer(x))


def test_channels_last_input() -> None:
    model = on_layer(nn.Conv2d(4, 6, 3, dtype=torch.float64).to(memory_format=torch.channels_last))
    x = picture(2).contiguous(memory_format=torch.channels_last)
    expected = model(x)
    close(model(x.contiguous()), expected)
    close(model.merge_and_unload()(x), expected)
