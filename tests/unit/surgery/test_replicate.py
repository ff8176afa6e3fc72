"""Replicated layers: copies share the base weights, have adapters of their own, and go as they came."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, initialize
from lorafa.backends import backend_of
from lorafa.errors import BackendError, CalibrationError, ConfigError, TargetError
from lorafa.models import QUANTIZERS
from lorafa.models.quantize import quantize_linears
from lorafa.surgery.plan import plan
from lorafa.surgery.replicate import ReplicatedLayers
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import places, tied_groups
from toys.adapters import train

RANGES = [[0, 2], [1, 3]]
ORDER = [0, 1, 1, 2]
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])


def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=8,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).double().eval()


def gemma() -> Any:
    """Its layers are of two types, which the config lists."""
    torch.manual_seed(0)
    config = hf.Gemma2Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, sliding_window=3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config).double().eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return hf.BertModel(config).double().eval()


def config_for(**settings: Any) -> LoraConfig:
    own = {"r": 2, "target_modules": "all-linear", "layer_replication": RANGES, "init_seed": 0}
    return LoraConfig(**(own | settings))


def adapted(model: Any, **settings: Any) -> PeftModel:
    made = get_peft_model(model, config_for(**settings))
    torch.manual_seed(1)
    train(made)
    return made.eval()


def output(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS, **more)
    value: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return value


def written_out(model: Any, stack: str) -> Any:
    """The model with layers copied by hand, each with weights of its own."""
    made = copy.deepcopy(model)
    parent, _, child = stack.rpartition(".")
    layers = [copy.deepcopy(made.get_submodule(stack)[number]) for number in ORDER]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    setattr(made.get_submodule(parent), child, nn.ModuleList(layers))
    made.config.num_hidden_layers = len(ORDER)
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = [made.config.layer_types[number] for number in ORDER]
    return made


@pytest.mark.parametrize(("make", "stack"), [(llama, "model.layers"), (gemma, "model.layers"), (bert, "encoder.layer")])
def test_it_computes_what_the_layers_written_out_compute(make: Any, stack: str) -> None:
    model = make()
    wanted = output(written_out(model, stack))
    assert not torch.allclose(output(model), wanted)
    torch.testing.assert_close(output(get_peft_model(model, config_for())), wanted)


def test_copies_share_weights_and_have_adapters_of_their_own() -> None:
    model = adapted(llama())
    layers = model.base_model.model.model.layers
    first, second = (layers[number].mlp.up_proj for number in (1, 2))
    assert first.base_layer.weight is second.base_layer.weight
    assert not torch.equal(first.lora_A["default"].weight, second.lora_A["default"].weight)
    written = get_peft_model(written_out(llama(), "model.layers"), config_for(layer_replication=None))
    written.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(model), output(written.eval()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    written(input_ids=IDS, labels=IDS).loss.backward()
    for name, mine in model.named_parameters():
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, written.get_parameter(name).grad)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
@pytest.mark.parametrize("way", QUANTIZERS.names())
def test_layers_in_few_bits_compute_the_same_in_every_copy_and_share_their_codes(way: str, called: bool) -> None:
    """Those without an adapter run their library's own forward, which may move codes about at its first call."""
    model = llama().float()
    if way.partition("_")[0] in ("bnb4", "bnb8", "torchao"):
        pytest.importorskip("torchao" if way.startswith("torchao") else "bitsandbytes")
    quantize_linears(model, way)
    before, wanted = copy.deepcopy(model), output(written_out(model, "model.layers"))
    if called:
        output(model)
    made = get_peft_model(model, config_for(target_modules=["q_proj"])).eval()
    for _ in range(2):
        torch.testing.assert_close(output(made), wanted)
    layers = made.base_model.model.model.layers
    for name, first in layers[1].named_modules():
        if (backend := backend_of(first)) is not None and backend.quantized:
            second = layers[2].get_submodule(name)
            assert first is not second
            for mine, theirs in zip(backend.keeps_beside(first), backend.keeps_beside(second), strict=True):
                assert mine is theirs
    torch.testing.assert_close(output(made.unload()), output(before))


def test_generation_keeps_keys_and_values_of_every_copy_apart() -> None:
    model = adapted(gemma())
    kept = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(kept, model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=False))


def test_taking_the_adapters_off_brings_the_stack_back() -> None:
    model = gemma()
    before, stack = output(model), model.model.layers
    said = model.config.to_dict()
    made = adapted(model)
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (4, 4)
    made.unload()
    assert model.model.layers is stack
    assert model.config.to_dict() == said
    assert torch.equal(output(model), before)


def test_a_plan_changes_nothing_and_what_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = {name: id(module) for name, module in model.named_modules()}
    planned = plan(resolve(model, config_for()), "default")
    assert [layer.target.name for layer in planned.layers if layer.target.name.endswith("up_proj")] == [
        f"model.layers.{number}.mlp.up_proj" for number in range(4)
    ]
    monkeypatch.setattr("lorafa.surgery.apply._host_for", None)
    with pytest.raises(TypeError):
        get_peft_model(model, config_for())
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.config.num_hidden_layers == 3


def test_places_of_copies_are_tied_to_nothing() -> None:
    model = llama()
    stack = ReplicatedLayers([copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
                              for layer in model.model.layers], [(0, 3)], model.model.layers)  # fmt: skip
    assert tied_groups(places(model, {"model.layers": stack})) == []
    with pytest.raises(TargetError, match="no place called"):
        list(places(model, {"model.stack": stack}))


def test_a_file_gives_the_same_here_and_in_peft(tmp_path: Path) -> None:
    model = adapted(llama())
    model.save_pretrained(tmp_path)
    wanted = output(model)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), wanted)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(output(theirs), wanted, rtol=1e-5, atol=1e-6)


def test_a_later_adapter_is_on_the_same_stack_and_says_so() -> None:
    model = adapted(llama())
    model.add_adapter("plain", config_for(layer_replication=None))
    assert [list(r) for r in model.peft_config["plain"].layer_replication] == RANGES
    with pytest.raises(ConfigError, match=r"layer_replication=\[\[0, 3\]\], but the layers of this model"):
        model.add_adapter("other", config_for(layer_replication=[[0, 3]]))


def test_a_start_from_data_sees_the_stack_as_it_will_be() -> None:
    batches = [{"input_ids": IDS, "labels": IDS}]
    settings = {"init_lora_weights": "eva", "target_modules": ["q_proj"]}
    model = llama()
    made = initialize(model, config_for(**settings), batches)
    written = initialize(written_out(llama(), "model.layers"), config_for(layer_replication=None, **settings), batches)
    layers = dict(made.base_model.lora_layers())
    assert len(layers) == len(ORDER)
    for name, layer in written.base_model.lora_layers():
        torch.testing.assert_close(layers[name].lora_A["default"].weight, layer.lora_A["default"].weight)
    model = llama()
    with pytest.raises(CalibrationError):
        initialize(model, config_for(**settings), [])
    assert model.config.num_hidden_layers == len(model.model.layers) == 3


def test_merging_is_refused_and_nothing_merged() -> None:
    model = adapted(llama())
    before = output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BackendError, match=r"Merging: the layers of 'model.layers' are replicated"):
            merge()
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("ranges", [[[0, 4]], [[2, 2]], [[2, 1]]])
def test_a_range_outside_of_the_model_is_refused(ranges: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match=r"which has 3 layers: ranges are \[start, end\) with 0|layer_replication"):
        get_peft_model(llama(), config_for(layer_replication=ranges))


def test_a_model_without_one_stack_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="needs a model with one list of layers, and a Sequential has none"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config_for(target_modules=["0"]))
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=31, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ConfigError, match=r"has 2: encoder\.block, decoder\.block|has \d"):
        get_peft_model(t5, config_for(target_modules=["q"]))


def test_adapters_that_are_there_already_are_in_the_way() -> None:
    model = get_peft_model(llama(), config_for(layer_replication=None))
    with pytest.raises(ConfigError, match=r"adapters are on the layers of 'model.layers' already"):
        model.add_adapter("second", config_for())
