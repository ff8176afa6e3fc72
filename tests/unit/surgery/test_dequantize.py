"""A quantized model with adapters becomes a dense one: the function that was trained, rounded once."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lorafa import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
)
from lorafa.backends import backend_of
from lorafa.errors import AdapterError, BackendError, ConfigError
from lorafa.models import QUANTIZERS
from lorafa.models.quantize import quantize_linears
from lorafa.surgery.dequantize import has_codes, merge_into_dense
from toys.adapters import train
from toys.compare import assert_unchanged, close, everything

X = torch.arange(12)[None]
TARGETS = ["q_proj", "up_proj", "down_proj"]


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, attention_bias=True, **sizes)).eval()


def adapted(way: str = "nf4", **settings: Any) -> PeftModel:
    model = llama()
    quantize_linears(model, way)
    made = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": TARGETS} | settings)))
    torch.manual_seed(1)
    train(made, 0.05)
    return made.eval()


def losses_of(model: PeftModel) -> torch.Tensor:
    """Six steps with an evaluation after each: bitsandbytes would pack the codes there, and lose the gradient."""
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(6):
        loss = model.train()(X, labels=X).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(X)
    return torch.stack(losses)


SETTINGS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("way", [way for way in QUANTIZERS.names() if way != "bnb8"])
def test_the_dense_model_computes_what_was_trained(way: str, settings: dict[str, Any]) -> None:
    model = adapted(way, **settings)
    with torch.no_grad():
        y = model(X).logits
        merged, lost = merge_into_dense(model)
        close(merged(X).logits, y, 1e-5)
    assert type(merged) is LlamaForCausalLM
    assert not has_codes(merged)
    assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {nn.Linear}
    assert lost.layers == (2 if "lora_bias" in settings else 6)
    assert lost.rounded < 1e-6 < lost.requantized


def test_a_layer_that_rounds_its_inputs_too_becomes_one_that_does_not() -> None:
    model = adapted("bnb8").train()  # bitsandbytes rounds no inputs there, on a CPU
    with torch.no_grad():
        y = model(X).logits
        close(merge_into_dense(model)[0](X).logits, y, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_numbers_are_those_of_the_weights(dtype: torch.dtype) -> None:
    model = adapted()
    exact, update, again = [], [], []
    for _, layer in model.base_model.lora_layers():
        W = layer.base_weight()
        exact.append(W + layer.adapters["default"].product())
        update.append(layer.adapters["default"].product())
        again.append(backend_of(layer.base_layer).weight(backend_of(layer.base_layer).with_weight(layer.base_layer, exact[-1])))  # noqa: E501
    merged, lost = merge_into_dense(model, dtype)

    def norm(tensors: list[torch.Tensor]) -> float:
        return float(torch.cat([one.detach().flatten() for one in tensors]).norm())

    kept = [m.weight for n, m in merged.named_modules() if n.rpartition(".")[2] in TARGETS]
    assert {one.dtype for one in kept} == {dtype}
    assert lost.dtype == str(dtype).removeprefix("torch.")
    assert lost.update == pytest.approx(norm(update) / norm(exact), rel=1e-3)
    off = norm([one.float() - other for one, other in zip(kept, exact, strict=True)]) / norm(exact)
    assert lost.rounded == pytest.approx(off, rel=1e-3, abs=1e-9)
    assert (1e-3 < lost.rounded < 3e-3) == (dtype is torch.bfloat16)
    lost_again = norm([one - other for one, other in zip(again, exact, strict=True)]) / norm(exact)
    assert lost.requantized == pytest.approx(lost_again, rel=1e-3)
    assert 0.05 < lost.requantized < 0.12
    assert re.match(r"Merged into dense weights \(\w+\): the update is [\d.]+% of 6 weights, rounding", lost.in_words())


def test_a_merged_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    """The codes of a LoftQ base were written once, and nothing reads them."""
    model = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    )
    train(model, 0.05)
    with torch.no_grad():
        y = model.eval()(X).logits
        merge_into_dense(model)[0].save_pretrained(tmp_path)
        loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not said["missing_keys"]
        assert not said["unexpected_keys"]
        close(loaded(X).logits, y, 1e-5)


def test_a_model_that_transformers_has_quantized_trains_merges_and_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, dtype=torch.float32)
    assert has_codes(model)
    config = LoraConfig(r=4, target_modules="all-linear", init_seed=3)
    twin, _ = merge_into_dense(get_peft_model(copy.deepcopy(model), config))  # B is zero: the weights of the codes
    model = get_peft_model(prepare_model_for_kbit_training(model), config)
    losses, wanted = losses_of(model), losses_of(get_peft_model(twin, config))
    assert wanted[-1] < wanted[0] - 0.1
    close(losses, wanted, 1e-4)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        y = model(X).logits
        merged, _ = merge_into_dense(model)
        close(merged(X).logits, y, 1e-5)
        merged.save_pretrained(tmp_path / "merged")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        close(dense(X).logits, y, 1e-5)
    assert not hasattr(dense.config, "quantization_config")


def test_what_cannot_be_done_is_said_and_changes_nothing() -> None:
    model = adapted()
    before = everything(model)
    with pytest.raises(ConfigError, match=r"Dense weights cannot be torch\.int8\. Pass torch\.bfloat16"):
        merge_into_dense(model, torch.int8)
    with pytest.raises(ConfigError, match=r"Dense weights cannot be 'bfloat16'\. Pass torch\.bfloat16"):
        merge_into_dense(model, "bfloat16")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        merge_into_dense(model, adapter_names=["nobody"])
    for merge in (merge_into_dense, PeftModel.merge_and_unload):
        with pytest.raises(AdapterError, match=r"given as a list, found 'default'\. Pass \['default'\]"):
            merge(model, adapter_names="default")
    with pytest.raises(AdapterError, match=r"takes the PeftModel whose adapters are to be merged, found "):
        merge_into_dense(model.get_base_model())
    assert_unchanged(before, model)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight").fill_(float("inf"))
    before = everything(model)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj: merging 'default' gives inf or nan in"):
        merge_into_dense(model)
    assert_unchanged(before, model)
    dense = get_peft_model(llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match=r"No layer of this model is quantized, so merge_and_unload\(\) makes the"):
        merge_into_dense(dense)


def test_what_changes_with_the_input_is_refused_by_adapter_and_layer() -> None:
    model = adapted(alora_invocation_tokens=[3])
    before = everything(model)
    text = r"Merging adapter 'default': its update of '\S+layers\.0\.self_attn\.q_proj' \(alora\) changes with"
    with pytest.raises(BackendError, match=text):
        merge_into_dense(model)
    assert_unchanged(before, model)


def test_a_merged_adapter_and_a_second_one_are_summed_from_the_codes_as_they_were() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        y = model(X).logits
        twin = copy.deepcopy(model)
        twin.merge_adapter(["default"])
        for one in (model, twin):
            close(merge_into_dense(one, adapter_names=["default", "second"])[0](X).logits, y, 1e-5)


@pytest.mark.parametrize("way", QUANTIZERS.names())
def test_parameters_are_counted_as_the_numbers_that_codes_stand_for(way: str) -> None:
    model = llama()
    dense = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=TARGETS)).get_nb_trainable_parameters()
    quantize_linears(model, way)
    assert get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)).get_nb_trainable_parameters() == dense


@pytest.mark.parametrize("way", QUANTIZERS.names())
def test_loftq_fits_an_adapter_to_what_any_way_of_quantizing_lost(way: str, tmp_path: Path) -> None:
    """[W - Q]_r: with the full rank nothing is lost any more, with a small one less than before."""
    dense = llama()
    dense.save_pretrained(tmp_path)
    weights = {name: module.weight for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    off = {}
    for rank in (0, 8, 64):
        model = llama()
        quantize_linears(model, way)
        adapted = get_peft_model(model, LoraConfig(r=max(rank, 1), lora_alpha=3, target_modules=["q_proj"]))
        if rank:
            replace_lora_weights_loftq(adapted, tmp_path)
        for path, layer in adapted.base_model.lora_layers():
            values = layer.base_weight() + layer.adapters["default"].product()
            off[rank] = float((values.detach() - weights[path]).norm() / weights[path].norm())
    assert off[64] < 1e-5
    assert 1e-5 < off[8] < 0.85 * off[0]


def test_a_prepared_model_packs_no_codes_in_evaluation() -> None:
    """Those of layers without an adapter: bitsandbytes runs them, and would have no gradient afterwards."""
    model = llama()
    quantize_linears(model, "bnb4")
    layer = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True
    prepare_model_for_kbit_training(model)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        model.eval()(X)
    assert torch.equal(layer.weight, before)
    x = torch.randn(3, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad is not None
