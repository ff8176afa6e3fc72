"""A weight summed with its updates block by block: the numbers of one sum in float32, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafa import LoraConfig, get_peft_model
from lorafa.layers import blocks
from lorafa.layers.base import LoraLayer
from lorafa.layers.blocks import sum_in_blocks
from toys.adapters import train
from toys.layers import Single

LAYERS: dict[str, Any] = {
    "tall": lambda: nn.Linear(5, 300),
    "wide": lambda: nn.Linear(300, 5),
    "one row": lambda: nn.Linear(300, 1),
    "stored the other way round": lambda: Conv1D(40, 7),
    "table": lambda: nn.Embedding(50, 6),
    "kernel": lambda: nn.Conv2d(3, 9, 3),
}


def layer_of(make: Any, *names: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> LoraLayer:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 1, "target_modules": ["layer"], "lora_alpha": 3} | settings)
    model = get_peft_model(Single(make().to(dtype)), config)
    for name in names:
        model.add_adapter(name, config)
    train(model)
    for parameter in model.parameters():  # also of those that do not count
        parameter.data += 0.01
    return model.base_model.lora_layers()[0][1]


@pytest.mark.parametrize("numbers", [1, 64, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_blocks_of_any_size_give_the_sum_of_dense_matrices(
    case: str, dtype: torch.dtype, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "NUMBERS", numbers)
    layer = layer_of(LAYERS[case], "second", dtype=dtype, init_lora_weights="pissa" if case == "tall" else True)
    weight, adapters = layer.base_weight().detach(), list(layer.adapters.values())
    with torch.no_grad():
        made = sum_in_blocks(weight, adapters)
        wanted = weight.double()
        for adapter in adapters:
            A, B = (factor.double() for factor in adapter.factors)
            wanted = wanted + adapter.scaling * (B @ A)
    assert made is not None
    assert made.dtype is dtype
    assert made.stride() == weight.stride()
    close = torch.finfo(dtype).eps * wanted.abs() / 2 + 1e-6  # half a unit, and what float32 leaves
    assert bool(((made.double() - wanted).abs() <= 1.01 * close).all())


def test_the_threads_are_as_they_were() -> None:
    layer, before = layer_of(LAYERS["tall"]), torch.get_num_threads()
    with torch.no_grad():
        assert sum_in_blocks(layer.base_weight(), list(layer.adapters.values())) is not None
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("settings", "dtype"), [({}, torch.float32), ({"use_dora": True}, torch.bfloat16)], ids=["float32", "dora"]
)
def test_what_is_no_matter_of_blocks_is_summed_as_a_whole(settings: dict[str, Any], dtype: torch.dtype) -> None:
    layer = layer_of(LAYERS["tall"], dtype=dtype, **settings)
    with torch.no_grad():
        assert sum_in_blocks(layer.base_weight(), list(layer.adapters.values())) is None
    assert layer.merged_base(["default"]).weight.dtype is dtype


def test_memory_is_that_of_the_result_and_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 matrix of the weight's size is made: seen by what torch is asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype is torch.float32:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(blocks, "NUMBERS", 1000)
    layer = layer_of(lambda: nn.Linear(100, 500))
    with torch.no_grad(), Watch():
        layer.merged_base(["default"])
    assert largest <= 4 * 1000
