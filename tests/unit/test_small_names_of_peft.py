"""Functions and methods of PEFT that scripts call beside the large ones."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorafa
from lorafa import LoraConfig, LoraModel, PeftModel, get_peft_model
from lorafa.backends.nf4 import NF4Linear
from lorafa.errors import AdapterError, CheckpointError, ConfigError, SourceError
from lorafa.optimizers import LoraFAOptimizer
from toys.adapters import adapted, only_layer
from toys.layers import input_for
from toys.several import Model, config, run, three, trains

LINEAR = "torch.nn.modules.linear.Linear"


def test_public_names_are_sorted_and_there() -> None:
    assert lorafa.__all__ == sorted(lorafa.__all__)
    assert all(hasattr(lorafa, name) for name in lorafa.__all__)


# ---- scaling for a while


@pytest.mark.parametrize("multiplier", [0.0, 0.5, -2.0])
def test_updates_are_multiplied_inside_the_block_and_as_they_were_after_it(multiplier: float) -> None:
    model = three()
    y = run(model)
    with model.disable_adapter():
        base = run(model)
    layers = [layer for _, layer in model.base_model.lora_layers()]
    before = [dict(layer.scaling) for layer in layers]
    with lorafa.rescale_adapter_scale(model, multiplier):
        for layer, scalings in zip(layers, before, strict=True):
            assert dict(layer.scaling) == {name: scaling * multiplier for name, scaling in scalings.items()}
        inside = run(model)
    assert [dict(layer.scaling) for layer in layers] == before
    torch.testing.assert_close(run(model), y, rtol=0, atol=0)
    assert not torch.allclose(inside, y)
    x = input_for(LINEAR)
    single = adapted(LINEAR).eval()
    with single.disable_adapter():
        alone = single(x)
    full = single(x)
    with lorafa.rescale_adapter_scale(single, multiplier):
        torch.testing.assert_close(single(x), alone + multiplier * (full - alone), rtol=1e-4, atol=1e-5)
    assert base.shape == y.shape


def test_scalings_come_back_after_an_error() -> None:
    model = adapted(LINEAR)
    before = dict(only_layer(model).scaling)
    with pytest.raises(ZeroDivisionError), lorafa.rescale_adapter_scale(model, 3.0):
        raise ZeroDivisionError
    assert dict(only_layer(model).scaling) == before


def test_what_cannot_be_rescaled_is_refused() -> None:
    model = adapted(LINEAR, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match=r"multiplier must be a finite number, found 'x' \(str\)"), \
            lorafa.rescale_adapter_scale(model, "x"):  # type: ignore[arg-type]  # fmt: skip
        pass
    with pytest.raises(AdapterError, match="The Linear has no adapters to scale"), \
            lorafa.rescale_adapter_scale(nn.Linear(2, 2), 2.0):  # fmt: skip
        pass
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the base weights"), lorafa.rescale_adapter_scale(model, 2.0):
        pass
    model.unmerge_adapter()
    lorafa.mutate_base(model)
    with pytest.raises(AdapterError, match=r"taken out of the base weights, for the scaling it has\. Call"), \
            lorafa.rescale_adapter_scale(model, 2.0):  # fmt: skip
        pass


# ---- files


def test_whether_a_folder_holds_an_adapter(tmp_path: Path) -> None:
    three().save_pretrained(tmp_path / "adapter")
    assert lorafa.check_if_peft_model(tmp_path / "adapter" / "a")
    assert not lorafa.check_if_peft_model(tmp_path)
    assert not lorafa.check_if_peft_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="check_if_peft_model has no argument 'revison'"):
        lorafa.check_if_peft_model(tmp_path, revison="main")  # type: ignore[call-arg]


def test_a_hub_that_cannot_say_what_it_holds_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SourceError, match="the Hub could not be reached"):
        lorafa.check_if_peft_model("owner/x", endpoint="http://127.0.0.1:9", cache_dir=tmp_path, token=False)


def test_the_tensors_of_a_file_by_their_names_there(tmp_path: Path) -> None:
    model = get_peft_model(Model(), config())
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    found = lorafa.load_peft_weights(tmp_path, device="cpu")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    mapping = {"^first": "one", "lora_A": "x", "base_model": "y"}
    renamed = lorafa.load_peft_weights(tmp_path, key_mapping=mapping)
    mapped = {key: key.replace(".first", ".one") for key in expected}
    mapped = {key: new if new != key else key.replace("lora_A", "x") for key, new in mapped.items()}
    assert renamed.keys() == set(mapped.values()), "the first that occurs, and never in the prefix"
    theirs = peft.load_peft_weights(str(tmp_path), "cpu", key_mapping=mapping)
    assert renamed.keys() == theirs.keys()
    assert lorafa.load_peft_weights(tmp_path, "meta")["base_model.model.first.lora_A.weight"].is_meta
    lorafa.set_peft_model_state_dict(get_peft_model(Model(), config()), found)
    torch.save(expected, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle, and opening a pickle can run any code"):
        lorafa.load_peft_weights(tmp_path, use_safetensors=False)
    assert lorafa.load_peft_weights(tmp_path, use_safetensors=False, allow_pickle=True).keys() == expected.keys()
    with pytest.raises(ConfigError, match="load_peft_weights has no argument 'sub_folder'"):
        lorafa.load_peft_weights(tmp_path, sub_folder="x")  # type: ignore[call-arg]


def test_configs_have_pefts_names(tmp_path: Path) -> None:
    assert lorafa.PeftConfig is LoraConfig
    LoraConfig(r=3, target_modules=["q"]).save_pretrained(tmp_path)
    read = lorafa.PeftConfig.from_pretrained(tmp_path, proxies={"https": "x"}, use_auth_token=True)
    assert isinstance(read, LoraConfig)
    assert read.r == 3
    with pytest.raises(
        ConfigError, match=r"LoraConfig\.from_pretrained has no argument 'revison'\. Did you mean 'revision'"
    ):
        LoraConfig.from_pretrained(tmp_path, revison="main")  # type: ignore[call-arg]
    assert lorafa.get_peft_config({"peft_type": "LORA", "r": 5}).r == 5
    with pytest.raises(ConfigError, match="has no peft_type"):
        lorafa.get_peft_config({"r": 5})


# ---- layers and models


def test_a_layer_forgets_an_adapter_by_pefts_name() -> None:
    model = three()
    first = model.get_base_model().first
    first.delete_adapter("b")
    assert set(first.adapters) == {"a"}
    assert "b" not in first.lora_A
    model.merge_adapter(["a"])
    with pytest.raises(AdapterError, match="is merged"):
        first.delete_adapter("a")


DELEGATED = ("merge_adapter", "unmerge_adapter", "delete_adapter", "merge_and_unload", "unload", "set_requires_grad",
             "enable_adapter_layers", "disable_adapter_layers")  # fmt: skip


@pytest.mark.parametrize("name", DELEGATED)
def test_methods_on_adapters_are_peft_models_own_typed_and_documented(name: str) -> None:
    method = inspect.getattr_static(PeftModel, name)
    assert inspect.getdoc(method)
    hints = inspect.signature(method)
    assert hints.return_annotation is not inspect.Signature.empty
    assert list(hints.parameters) == list(inspect.signature(getattr(LoraModel, name)).parameters)


def test_methods_on_adapters_do_what_base_models_do() -> None:
    model = three()
    y = run(model)
    with model.disable_adapter():
        base = run(model)
    model.disable_adapter_layers()
    torch.testing.assert_close(run(model), base, rtol=0, atol=0)
    model.enable_adapter_layers()
    torch.testing.assert_close(run(model), y, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(run(model), y)
    model.unmerge_adapter()
    model.set_requires_grad(["a", "c"], False)
    assert not trains(model)
    model.set_requires_grad("c")
    assert {name.split(".")[-2] for name in trains(model)} == {"c"}
    model.delete_adapter("c")
    assert list(model.peft_config) == ["a", "b"]
    assert type(model.merge_and_unload()) is Model
    assert type(three().unload()) is Model


def test_lora_fa_refuses_groups_that_say_no_layers() -> None:
    model = get_peft_model(Model(), config())
    named = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    group = {"params": [p for _, p in named], "names": [n for n, _ in named], "scaling_factor": 4.0, "lr": 1e-3}
    with pytest.raises(ConfigError, match=r"was given no pairs\. Call create_lorafa_optimizer\(model, \.\.\.\)"):
        LoraFAOptimizer([group])


# ---- before training


class Halves(nn.Module):
    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 64).bfloat16(), nn.LayerNorm(64).half()
        linear = nn.Linear(64, 64)
        self.linear = NF4Linear.from_linear(linear) if quantized else linear.bfloat16()
        self.asked: list[dict[str, Any]] = []
        self.inputs = 0

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.asked.append(kwargs)

    def enable_input_require_grads(self) -> None:
        self.inputs += 1


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_is_frozen_widened_and_checkpointed_if_quantized(quantized: bool) -> None:
    model = Halves(quantized)
    codes = {name: b.clone() for name, b in model.linear.named_buffers()}
    values = {name: p.detach().float() for name, p in model.named_parameters()}
    assert (
        lorafa.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False}) is model
    )
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert all(torch.equal(p.float(), values[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, codes[name]) for name, b in model.linear.named_buffers())
    asked = [{"gradient_checkpointing_kwargs": {"use_reentrant": False}}] if quantized else []
    assert (model.asked, model.inputs) == (asked, len(asked))
    model.asked = []
    lorafa.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lorafa.prepare_model_for_kbit_training(nn.Linear(2, 2))
    assert model.asked == []
    with pytest.raises(AdapterError, match=r"The model must be a torch\.nn\.Module"):
        lorafa.prepare_model_for_kbit_training("name")  # type: ignore[arg-type]


def test_both_names_of_checkpointing_reach_the_model() -> None:
    model = get_peft_model(Halves(False), LoraConfig(target_modules=["linear"]))
    base = model.get_base_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert (base.asked, base.inputs) == ([{"gradient_checkpointing_kwargs": {"use_reentrant": True}}], 1)
    with pytest.raises(AttributeError, match="activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    assert base.inputs == 1
    assert re.search("requires? a gradient", str(inspect.getdoc(PeftModel.gradient_checkpointing_enable)))
