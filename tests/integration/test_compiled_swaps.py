"""Adapters exchanged, and scaled, under torch.compile: the code that was made for the first one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import PeftModel, hotswap_adapter, prepare_model_for_compiled_hotswap, rescale_adapter_scale
from lorafa.surgery.walk import lora_layers
from toys.adapters import train
from toys.compare import close
from toys.language_models import IDS, adapted, llama

ADAPTERS: dict[str, dict[str, Any]] = {
    "another rank": {"r": 2},
    "the highest rank": {"r": 8, "lora_alpha": 3},
    "another alpha": {"lora_alpha": 20},
    "rsLoRA": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"q_proj": 7, "down_proj": 1}, "alpha_pattern": {"v_proj": 9}},
    "fewer layers": {"target_modules": ["q_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


class Counted:
    """A model compiled by a back end that counts the graphs it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs = 0
        self.compiled = torch.compile(model, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph

    @torch.no_grad()
    def __call__(self) -> Tensor:
        logits: Tensor = self.compiled(input_ids=IDS, use_cache=False).logits
        return logits


def saved(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(3)
    model = adapted(llama(), **settings)
    train(model, 0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def fresh(folder: Path) -> Tensor:
    logits: Tensor = PeftModel.from_pretrained(llama(), folder)(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("formula", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "lora_bias"])
def test_no_exchange_and_no_scaling_compiles_again(formula: dict[str, Any], tmp_path: Path) -> None:
    first = saved(tmp_path / "first", **formula)
    folders = {name: saved(tmp_path / name, **(formula | settings)) for name, settings in ADAPTERS.items()}
    model = PeftModel.from_pretrained(llama(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    counted = Counted(model)
    outputs = counted()
    close(outputs, fresh(first), torch.float32)
    graphs = counted.graphs
    assert graphs >= 1
    for name, folder in folders.items():
        hotswap_adapter(counted.compiled, folder, "default")
        swapped = counted()
        close(swapped, fresh(folder), torch.float32)
        assert not torch.allclose(swapped, outputs, atol=1e-4), name
        outputs = swapped
    hotswap_adapter(model, first, "default")
    close(counted(), fresh(first), torch.float32)
    assert counted.graphs == graphs
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.slow
def test_scalings_of_a_prepared_model_change_without_compiling_again(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(llama(), saved(tmp_path / "first"))
    prepare_model_for_compiled_hotswap(model)
    counted = Counted(model)
    first, graphs = counted(), counted.graphs
    layers = [layer for _, layer in lora_layers(model)]
    tensors = [layer.scaling["default"] for layer in layers]
    for layer in layers:
        layer.set_scale("default", 0.0)
    base = counted()
    with model.disable_adapter(), torch.no_grad():
        close(base, model(input_ids=IDS).logits, torch.float32)
    for layer in layers:
        layer.unscale_layer()
    close(counted(), first, torch.float32)
    assert all(layer.scaling["default"] is tensor for layer, tensor in zip(layers, tensors, strict=True))
    with rescale_adapter_scale(model, 0.0):
        close(counted(), base, torch.float32)
    close(counted(), first, torch.float32)
    for layer in layers:
        layer.scale_layer(0.0)
    close(counted(), base, torch.float32)
    hotswap_adapter(model, tmp_path / "first", "default")
    close(counted(), first, torch.float32)
    assert counted.graphs == graphs


@pytest.mark.slow
def test_values_are_exchanged_under_code_of_the_compiler_itself(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(llama(), saved(tmp_path / "first"))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.compile(backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        close(model(input_ids=IDS, use_cache=False).logits, fresh(tmp_path / "first"), torch.float32)
        new = saved(tmp_path / "new", r=7, lora_alpha=3)
        hotswap_adapter(model, new, "default")
        close(model(input_ids=IDS, use_cache=False).logits, fresh(new), torch.float32)


@pytest.mark.slow
def test_without_preparation_another_scaling_is_right_and_compiles_again(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(llama(), saved(tmp_path / "first"))
    counted = Counted(model)
    counted()
    graphs = counted.graphs
    new = saved(tmp_path / "new", lora_alpha=20)
    hotswap_adapter(model, new, "default")
    close(counted(), fresh(new), torch.float32)
    assert counted.graphs > graphs
