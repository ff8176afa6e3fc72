"""Functions around an adapter that scripts call, beside PEFT's own: base weights, scalings, models by their adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.helpers import rescale_adapter_scale as their_rescale
from torch import nn

import lorafa
from lorafa.errors import ConfigError
from toys.language_models import IDS, gpt2, llama, mixtral, t5
from toys.parity import quiet

CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (llama, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2], "use_dora": True}),
    (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    (t5, {"target_modules": ["q", "wo"]}),
]


@pytest.mark.parametrize(("make", "settings"), CASES, ids=["saved", "rows", "experts", "biases", "two stacks"])
def test_base_weights_have_pefts_names_and_order(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    base = make()
    with quiet():
        ours = lorafa.get_peft_model(copy.deepcopy(base), lorafa.LoraConfig(r=2, **settings))
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **copy.deepcopy(settings)))
    found, expected = lorafa.get_base_model_state_dict(ours), peft.get_base_model_state_dict(theirs)
    assert list(found) == list(expected) == list(base.state_dict())
    assert all(torch.equal(found[name], expected[name]) for name in found)
    other = {name: tensor + 1 for name, tensor in expected.items()}
    for lib, model in ((lorafa, ours), (peft, theirs)):
        assert tuple(lib.set_base_model_state_dict(model, other)) == ([], [])
    found, expected = lorafa.get_base_model_state_dict(ours), peft.get_base_model_state_dict(theirs)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    some = dict(list(other.items())[:2]) | {"more": torch.zeros(1)}
    one, two = (lib.set_base_model_state_dict(m, some, strict=False) for lib, m in ((lorafa, ours), (peft, theirs)))
    assert sorted(one.missing_keys) == sorted(two.missing_keys)
    assert one.unexpected_keys == two.unexpected_keys == ["more"]
    for lib, model in ((lorafa, ours), (peft, theirs)):
        with pytest.raises(RuntimeError, match=r"(?i)missing"):
            lib.set_base_model_state_dict(model, some)


def scalings(lib: ModuleType, multiplier: float) -> list[dict[str, float]]:
    """Scalings of two adapters inside a block, inside one in it, and after an error has left both."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = lib.get_peft_model(llama(), lib.LoraConfig(**settings))
    model.add_adapter("other", lib.LoraConfig(**(settings | {"lora_alpha": 3})))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    rescale = lorafa.rescale_adapter_scale if lib is lorafa else their_rescale
    found = []

    def all_of_it() -> None:
        with rescale(model, multiplier):
            found.append(dict(layer.scaling))
            with rescale(model, 3.0):
                found.append(dict(layer.scaling))
            found.append(dict(layer.scaling))
            raise KeyError

    with pytest.raises(KeyError):
        all_of_it()
    return [*found, dict(layer.scaling)]


@pytest.mark.parametrize("multiplier", [2, 0.5, 0, -1.0])
def test_scalings_change_for_a_block_as_in_peft(multiplier: float) -> None:
    assert scalings(lorafa, multiplier) == scalings(peft, multiplier)


def test_an_adapter_for_another_task_is_refused_by_the_auto_classes_of_both(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = lorafa.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lorafa.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"made for CAUSAL_LM, and AutoPeftModelForSequenceClassification loads its "
                       r"base for SEQ_CLS.* Use AutoPeftModelForCausalLM"):  # fmt: skip
        lorafa.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="asked for: PeftModelForSequenceClassification"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        ours = lorafa.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(input_ids=IDS).logits
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs)
