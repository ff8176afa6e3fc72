"""Adapters on bases whose weights rest elsewhere and are brought in by hooks of accelerate: they compute what they do
on the base in memory, whatever is done to them, or are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, mutate_base, restore_base
from lorafa.backends import BACKENDS
from lorafa.errors import BackendError, CheckpointError, ConfigError, TargetError
from lorafa.io.base_prints import base_fingerprint
from toys.adapters import config_for, only_layer, starts_of, train
from toys.compare import close
from toys.layers import Single, backend_for, base_layer, input_for
from toys.offload import (
    CALLED,
    CALLED_KINDS,
    WHERE,
    WITH_STARTS,
    Net,
    Offload,
    X,
    accelerate,
    offloading,
    pair,
    ran,
    rests,
    settings_for,
)

LINEAR = "torch.nn.modules.linear.Linear"
NF4 = "lorafa.backends.nf4.NF4Linear"
ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
EXPERTS = ("experts (E, out, in)", "experts (E, in, out)", "matrix parameter")


@pytest.fixture(params=WHERE)
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    return offloading(request.param, tmp_path)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind", "start"), WITH_STARTS, ids=str)
def test_outputs_and_gradients_are_those_of_the_base_in_memory(
    variant: str, kind: str, start: bool | str, offload: Offload
) -> None:
    (here, away), x = pair(kind, offload, **settings_for(variant, start)), input_for(kind)
    if not backend_for(kind).quantized:
        assert rests(away)
    (y, grads), (other, others) = ran(here, x), ran(away, x)
    close(other, y, torch.float32)
    assert grads.keys() == others.keys()
    for name in grads:
        close(others[name], grads[name], torch.float32)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), CALLED, ids=str)
def test_merged_unmerged_and_disabled_it_computes_as_in_memory(variant: str, kind: str, offload: Offload) -> None:
    (here, away), x = pair(kind, offload, **settings_for(variant, starts_of(variant, False)[0])), input_for(kind)
    y, plain = here(x), only_layer(here).base_layer(x)
    first, kept = away(x), only_layer(away).base_layer
    close(only_layer(away).get_delta_weight("default"), only_layer(here).get_delta_weight("default"), torch.float32)
    here.merge_adapter()
    away.merge_adapter()
    assert rests(away) or backend_for(kind).quantized
    close(away(x), here(x), torch.float32)
    if not backend_for(kind).quantized:
        close(away(x), y, torch.float32)
    with away.disable_adapter():
        close(away(x), plain, torch.float32)
    away.unmerge_adapter()
    assert only_layer(away).base_layer is kept
    assert torch.equal(away(x), first)
    merged, wanted = away.merge_and_unload(), here.merge_and_unload()
    assert type(merged.layer) is type(wanted.layer)
    close(merged(x), wanted(x), torch.float32)


@pytest.mark.parametrize("kind", [LINEAR, "torch.nn.modules.conv.Conv2d", "torch.nn.modules.sparse.Embedding"])
def test_a_start_is_taken_out_of_an_offloaded_base_and_put_back(kind: str, offload: Offload) -> None:
    (here, away), x = pair(kind, offload, init_lora_weights="pissa"), input_for(kind)
    y = away(x)
    mutate_base(here)
    mutate_base(away)
    assert rests(away)
    close(away(x), here(x), torch.float32)
    restore_base(away)
    assert torch.equal(away(x), y)


@pytest.mark.parametrize("kind", CALLED_KINDS)
def test_a_file_is_that_of_the_base_in_memory_and_is_loaded_on_either(
    kind: str, offload: Offload, tmp_path: Path
) -> None:
    (here, away), x = pair(kind, offload), input_for(kind)
    assert base_fingerprint(away.get_base_model()) == base_fingerprint(here.get_base_model())
    away.save_pretrained(tmp_path / "adapter")
    base = here.unload()
    y = away(x)
    close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(x), y, torch.float32)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(offload(copy.deepcopy(base)), tmp_path / "adapter", low_cpu_mem_usage=low)
        assert torch.equal(loaded(x), y)


def test_a_file_for_other_weights_is_refused_on_an_offloaded_base(offload: Offload, tmp_path: Path) -> None:
    pair(LINEAR, offload)[0].save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="was made for another base model: 1 of 1 adapted layers"):
        PeftModel.from_pretrained(offload(Single(base_layer(LINEAR))), tmp_path / "adapter")


def test_starts_read_the_values_that_are_brought_in(offload: Offload) -> None:
    for start in ("pissa", "olora", "milora", "orthogonal", "mica"):
        here, away = (only_layer(model) for model in pair(LINEAR, offload, init_lora_weights=start))
        close(away.adapters["default"].A, here.adapters["default"].A, torch.float32)
        close(away.adapters["default"].B, here.adapters["default"].B, torch.float32)


def test_hooks_of_the_user_on_an_offloaded_base_run_however_the_layer_is_used(offload: Offload) -> None:
    (_, away), x = pair(LINEAR, offload, init_lora_weights="pissa"), input_for(LINEAR)
    seen: list[bool] = []
    only_layer(away).base_layer.register_forward_hook(lambda module, args, y: seen.append(module.weight.is_meta))
    with away.disable_adapter():
        away(x)
    away(x)
    assert len(seen) == 2
    for replace in (mutate_base, PeftModel.merge_adapter):  # what the hook does to the output is not known
        with pytest.raises(BackendError, match=r"a hook is on it .* that may change values"):
            replace(away)


def test_a_layer_without_hooks_on_the_meta_device_keeps_its_adapter_there() -> None:
    """As ``low_cpu_mem_usage`` and models that are only counted have it."""
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_inputs_go_where_the_hook_of_the_base_brings_them() -> None:
    """There is one device to test with, so the other one is meta."""
    base = nn.Sequential(nn.Embedding(8, 4, device="meta"))
    accelerate.hooks.add_hook_to_module(base[0], accelerate.hooks.AlignDevicesHook(execution_device="meta"))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    y = model(torch.tensor([3, 5, 5]))
    assert (y.device.type, y.shape) == ("meta", (3, 4))


# ---- refused


@pytest.mark.parametrize("kind", [ATTENTION, *EXPERTS])
def test_layers_that_add_the_update_to_their_weight_are_refused(kind: str, offload: Offload) -> None:
    base = Single(base_layer(kind))
    model = get_peft_model(copy.deepcopy(base), config_for(kind))
    name = "layer" if kind == ATTENTION else "layer.weight"
    with pytest.raises(BackendError, match=rf"{name}: the weights of this \w+ rest elsewhere, and hooks of accelerate"):
        get_peft_model(offload(base), config_for(kind))
    offload(model)
    for call in (lambda: model(input_for(kind)), model.merge_adapter):
        with pytest.raises(BackendError, match=r"the weights of this \w+ rest elsewhere, and hooks of acc"):
            call()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_rest_elsewhere_are_not_trained(bias: str, offload: Offload) -> None:
    with pytest.raises(ConfigError, match=f"bias='{bias}' trains the bias of 'body', but that rests elsewhere"):
        get_peft_model(offload(Net()), LoraConfig(target_modules=["body"], bias=bias))


class Block(nn.Sequential):
    """Named among those whose weights are brought in together."""


@pytest.mark.parametrize("settings", [{"target_modules": ["0.0"]}, {"modules_to_save": ["0.0"]}], ids=str)
def test_modules_inside_one_that_brings_in_all_its_weights_are_refused(settings: dict[str, Any]) -> None:
    model = nn.Sequential(Block(nn.Linear(4, 4)), nn.Linear(4, 4))
    accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=["Block"])
    with pytest.raises(TargetError, match=r"'0.0' is inside '0', whose hook of accelerate brings in the weights"):
        get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": ["1"]} | settings)))
    x = torch.randn(2, 4)
    y = model(x)
    assert torch.equal(get_peft_model(model, LoraConfig(r=2, target_modules=["1"]))(x), y)


def test_a_layer_with_another_hook_of_accelerate_is_adapted_and_not_merged() -> None:
    class Shifting(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output + 1

    base = Net()
    accelerate.hooks.add_hook_to_module(base.body, Shifting())
    y = base(X)
    model = get_peft_model(base, LoraConfig(target_modules=["body"], r=2))
    assert torch.equal(model(X), y)
    train(model)
    y = model(X)
    with pytest.raises(BackendError, match="its forward was replaced by another function"):
        model.merge_adapter()
    assert torch.equal(model(X), y)


def test_quantized_layers_train_with_their_codes_brought_in() -> None:
    """Backward needs the codes after forward has taken them away."""
    base = nn.Sequential(base_layer(NF4), nn.Linear(24, 2))
    x, models = torch.randn(3, 8, requires_grad=True), []
    for model in (copy.deepcopy(base), copy.deepcopy(base)):
        if models:
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        models.append(get_peft_model(model, LoraConfig(target_modules=["0"], r=2)))
        models[-1](x).sum().backward()
    close(*(model.get_base_model()[0].lora_B["default"].weight.grad for model in models), torch.float32)


@pytest.mark.parametrize("kind", [kind for kind in BACKENDS.names() if not backend_for(kind).can_rest])
def test_codes_that_would_be_brought_in_without_their_scales_are_refused(kind: str) -> None:
    model = Single(base_layer(kind))
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(TargetError, match=r"'layer'.* its codes rest elsewhere .*without their scales; keep it"):
        get_peft_model(model, config_for(kind))
