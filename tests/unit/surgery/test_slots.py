"""Room for the ranks of adapters to come: what it is made for, and where there can be none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import (
    LoraConfig,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    rescale_adapter_scale,
)
from lorafa.errors import AdapterError, ConfigError
from lorafa.surgery.walk import lora_layers
from toys.compare import close, refused
from toys.swaps import BOTH, X, adapted, base, loaded, saved


def test_room_is_made_for_configs_to_come() -> None:
    model = adapted()
    config = LoraConfig(r=5, rank_pattern={"first": 7}, **BOTH)
    with refused(model, ConfigError, r"asks for rank 7, which target_rank=6 .*Set target_rank=7"):
        prepare_model_for_compiled_hotswap(model, target_rank=6, config=config)
    prepare_model_for_compiled_hotswap(model, config={"one": config, "two": LoraConfig(r=2, **BOTH)})
    assert {adapter.slots for _, layer in lora_layers(model) for adapter in layer.adapters.values()} == {7}
    assert (config.r, config.rank_pattern) == (5, {"first": 7})
    A = next(layer for _, layer in lora_layers(model)).lora_A["default"]
    assert (A.out_features, A.weight.shape[0]) == (7, 7)


def test_room_is_refused_where_there_can_be_none() -> None:
    model = adapted()
    with refused(model, AdapterError, r"has rank 4, which target_rank=3 .*Set target_rank=4"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with refused(model, ConfigError, "target_rank"):
        prepare_model_for_compiled_hotswap(model, target_rank=0)
    with refused(model, ConfigError, "check_compiled has no value 'eror'. Did you mean 'error'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="eror")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="has no adapters"):
        prepare_model_for_compiled_hotswap(base())
    with pytest.raises(ConfigError, match="config is empty"):
        prepare_model_for_compiled_hotswap(model, config={})


def test_a_compiled_model_is_refused_warned_of_or_prepared() -> None:
    model = adapted()
    compiled: Any = torch.compile(model, backend="eager")
    with refused(model, AdapterError, r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="ignore")
    assert {adapter.slots for _, layer in lora_layers(model) for adapter in layer.adapters.values()} == {9}


def test_groups_of_a_convolution_share_the_slots_out() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(4, 6, 2, groups=2)

    model = get_peft_model(Grouped(), LoraConfig(r=2, target_modules=["first"]))
    with refused(model, AdapterError, r"groups=2\. Set target_rank=6"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)


def test_an_adapter_without_memory_gets_no_room() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, **BOTH), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match=r"rests elsewhere \(device 'meta'\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)


def test_a_file_fills_a_prepared_adapter_as_before(tmp_path: Path) -> None:
    first = saved(tmp_path)
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    model.load_adapter(first, "default")
    close(model(X), loaded(first)(X))


def test_a_scaling_that_is_multiplied_stays_in_its_tensor(tmp_path: Path) -> None:
    """Code that torch.compile has made reads that tensor: a number in its place would compile it again."""
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layers = [layer for _, layer in lora_layers(model)]
    held = [layer.scaling["default"] for layer in layers]

    def scalings() -> list[float]:
        assert all(layer.scaling["default"] is tensor for layer, tensor in zip(layers, held, strict=True))
        return [float(tensor) for tensor in held]

    for layer in layers:
        layer.scale_layer(3.0)
    assert scalings() == [4.5, 4.5]
    for layer in layers:
        layer.unscale_layer(2.0)
    assert scalings() == [2.25, 2.25]
    with rescale_adapter_scale(model, -2.0):
        assert scalings() == [-4.5, -4.5]
    assert scalings() == [2.25, 2.25]
    hotswap_adapter(model, saved(tmp_path, r=6, lora_alpha=3), "default")
    assert scalings() == [0.5, 0.5]
