"""Bases whose weights rest elsewhere and are brought in by hooks of accelerate: an adapter computes what it does in
memory, whatever is done to it, or is refused by name."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapter_toys import (
    DEFINED,
    Single,
    backend_for,
    base_layer,
    close,
    config_for,
    input_for,
    only_layer,
    read_by,
    starts_of,
    stats_for,
    train,
    weight_for,
)
from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, mutate_base, restore_base
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError, TargetError
from lorafa.io.adapter_files import base_fingerprint

accelerate = pytest.importorskip("accelerate")
LINEAR = "torch.nn.modules.linear.Linear"
NF4 = "lorafa.backends.nf4.NF4Linear"
ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
EXPERTS = ("experts (E, out, in)", "experts (E, in, out)", "matrix parameter")
CALLED = [(v, k) for v, k in DEFINED if backend_for(k).host in ("linear", "conv", "embedding")]
WITH_STARTS = [(v, k, start) for v, k in CALLED for start in starts_of(v, False, "pissa")]
KINDS = list(dict.fromkeys(kind for _, kind in CALLED))
Offload = Callable[[nn.Module], nn.Module]
numbers = itertools.count()


@pytest.fixture(params=["memory", "memory with buffers", "disk"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    """What takes the weights of a model away, to be brought in by hooks."""

    def away(model: nn.Module) -> nn.Module:
        if request.param == "disk":
            accelerate.disk_offload(model, str(tmp_path / str(next(numbers))), execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers="buffers" in request.param)
        return model

    return away


def in_memory(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


def settings_for(variant: str, start: bool | str) -> dict[str, Any]:
    return {"use_dora": True} if variant == "dora" else {"init_lora_weights": start}


def pair(kind: str, offload: Offload, **settings: Any) -> tuple[PeftModel, PeftModel]:
    """The same adapter on the same base, in memory and offloaded."""
    base = Single(base_layer(kind, dtype=torch.float32))
    models = []
    for model in (copy.deepcopy(base), offload(copy.deepcopy(base))):
        config, stats = config_for(kind, **settings), {"layer": stats_for(weight_for(kind))}
        models.append(get_peft_model(model, config, stats=read_by(config.init_lora_weights, stats)))
        torch.manual_seed(1)
        train(models[-1])
    return models[0], models[1]


def rests(model: PeftModel) -> bool:
    return any(p.is_meta for p in only_layer(model).get_base_layer().parameters())


def ran(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y: Tensor = model(x)
    y.sin().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_that_of_the_base_in_memory_and_is_loaded_on_either(
    kind: str, offload: Offload, tmp_path: Path
) -> None:
    (here, away), x = pair(kind, offload), input_for(kind)
    assert base_fingerprint(away.get_base_model()) == base_fingerprint(here.get_base_model())
    away.save_pretrained(tmp_path / "adapter")
    base = here.unload()
    y = away(x)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(x), y.detach()) or (
        close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(x), y, torch.float32) is None
    )
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
    assert model(torch.empty(3, 8, device="meta")).shape == (3, 4)


def test_inputs_go_where_the_hook_of_the_base_brings_them() -> None:
    """There is one device to test with, so the other one is meta."""
    base = nn.Sequential(nn.Linear(8, 4, device="meta"))
    accelerate.hooks.add_hook_to_module(base[0], accelerate.hooks.AlignDevicesHook(execution_device="meta"))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    y = model(torch.randn(3, 8))
    assert (y.device.type, y.shape) == ("meta", (3, 4))


# ---- what is trained beside the factors


class Net(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(self.embed(x))))
        return y


X = torch.tensor([[1, 3, 3], [9, 0, 7]])
BESIDE: dict[str, dict[str, Any]] = {
    "copy": {"modules_to_save": ["head"]},
    "rows of the embedding": {"trainable_token_indices": {"embed": [3, 7]}},
    "rows of the head": {"trainable_token_indices": {"head": [3, 7]}},
    "embedding and head": {"target_modules": ["embed", "body", "head"]},
}


def nets(offload: Offload, *, tied: bool = False, **settings: Any) -> list[PeftModel]:
    models = []
    for model in (Net(tied=tied), offload(Net(tied=tied))):
        models.append(get_peft_model(model, LoraConfig(**({"target_modules": ["body"], "r": 2} | settings))))
        torch.manual_seed(1)
        train(models[-1])
    return models


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_copies_and_rows_train_merge_and_are_saved_as_in_memory(
    settings: dict[str, Any], offload: Offload, tmp_path: Path
) -> None:
    here, away = nets(offload, **settings)
    (y, grads), (other, others) = ran(here, X), ran(away, X)
    close(other, y, torch.float32)
    assert grads.keys() == others.keys()
    assert not any(p.is_meta for p in away.parameters() if p.requires_grad)
    for name in grads:
        close(others[name], grads[name], torch.float32)
    away.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(offload(Net()), tmp_path)(X), away.eval()(X))
    close(PeftModel.from_pretrained(Net(), tmp_path)(X), y, torch.float32)
    close(away.merge_and_unload()(X), y, torch.float32)


def test_a_copy_of_a_module_with_children_is_in_memory_whole(offload: Offload) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))

    x, config = torch.randn(5, 4), LoraConfig(target_modules=["0"], r=2, modules_to_save=["1"])
    here, away = get_peft_model(model(), config), get_peft_model(offload(model()), config)
    close(away(x), here(x), torch.float32)
    assert not any(p.is_meta for p in away.get_base_model()[1].modules_to_save.parameters())
    assert get_peft_model_state_dict(away).keys() == get_peft_model_state_dict(here).keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [3, 7]},
        {"target_modules": ["embed", "head"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed", "head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_what_shares_a_weight_is_found_though_each_has_it_brought_in_for_itself(
    settings: dict[str, Any], called: bool
) -> None:
    def away(model: nn.Module) -> nn.Module:
        in_memory(model)
        if called:
            model(X)
        return model

    here, other = nets(away, tied=True, **settings)
    y, grads = ran(here, X)
    found, others = ran(other, X)
    close(found, y, torch.float32)
    assert grads.keys() == others.keys()
    for name in grads:
        close(others[name], grads[name], torch.float32)
    with pytest.warns(UserWarning, match="hold different weights") if "modules_to_save" not in settings else _silence():
        merged = other.merge_and_unload()
    close(merged(X), y, torch.float32)


def _silence() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_embeddings_saved_with_an_adapter_are_those_that_are_brought_in(offload: Offload, tmp_path: Path) -> None:
    here, away = nets(offload)
    tensors = [get_peft_model_state_dict(model, save_embedding_layers=True) for model in (here, away)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0] if "lora" not in key)
    here.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=r"Adapter 'default' cannot be filled: embed.weight, head.weight rest"):
        PeftModel.from_pretrained(offload(Net()), tmp_path)


# ---- an adapted model that is offloaded


@pytest.mark.parametrize(("variant", "kind", "start"), WITH_STARTS, ids=str)
def test_an_adapted_model_can_be_offloaded(variant: str, kind: str, start: bool | str, offload: Offload) -> None:
    (model, _), x = pair(kind, in_memory, **settings_for(variant, start)), input_for(kind)
    model.eval()
    y, tensors = model(x), get_peft_model_state_dict(model)
    tensors = {key: value.clone() for key, value in tensors.items()}
    offload(model)
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        close(model(x), y, torch.float32)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, tensors[key])
    model.merge_adapter()
    if not backend_for(kind).quantized:
        close(model(x), y, torch.float32)
    model.unmerge_adapter()
    close(model(x), y, torch.float32)


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_copies_and_rows_of_an_adapted_model_can_be_offloaded(settings: dict[str, Any], offload: Offload) -> None:
    model = nets(in_memory, **settings)[0].eval()
    y = model(X)
    offload(model)
    close(model(X), y, torch.float32)
    close(model.merge_and_unload()(X), y, torch.float32)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, *BESIDE.values()], ids=["lora", "dora", *BESIDE])
def test_an_adapter_that_is_offloaded_itself_is_not_trained(settings: dict[str, Any], offload: Offload) -> None:
    model = nets(in_memory, **settings)[0]
    offload(model)
    with pytest.raises(AdapterError, match="Adapter 'default' cannot be trained: its parameters rest elsewhere"):
        model.train()(X)
    with torch.no_grad():
        model(X)


def test_an_adapter_that_is_offloaded_itself_is_not_filled(offload: Offload, tmp_path: Path) -> None:
    model = nets(in_memory)[0]
    model.save_pretrained(tmp_path)
    offload(model)
    with pytest.raises(CheckpointError, match=r"body.lora_A.weight, body.lora_B.weight rest elsewhere \(device"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_can_be_dispatched(kind: str, tmp_path: Path) -> None:
    (model, _), x = pair(kind, in_memory), input_for(kind)
    model.eval()
    y = model(x)
    for n, device in enumerate(("cpu", "disk")):
        twin = copy.deepcopy(model)
        folder = str(tmp_path / str(n))
        accelerate.dispatch_model(twin, {"": device}, main_device="cpu", offload_dir=folder, force_hooks=True)
        close(twin(x), y, torch.float32)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    close(ran(model.train(), x)[0], y, torch.float32)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


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
    with pytest.raises(BackendError, match="A Shifting is on this Linear, and what it does to a layer's weights"):
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
