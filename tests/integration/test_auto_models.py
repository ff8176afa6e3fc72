"""Auto classes: base and adapter from the adapter's folder alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorafa
from lorafa import AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from lorafa.errors import ConfigError, SourceError
from toys.language_models import IDS, SMALL, adapted, inference, llama


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base model on disk, and an adapter made for it."""
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(base, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def expected(base: Path, adapter: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return inference(lorafa.PeftModel.from_pretrained(model, adapter))


@pytest.mark.parametrize("kind", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_a_model_is_loaded_from_its_adapter(kind: Any, folders: tuple[Path, Path]) -> None:
    model = kind.from_pretrained(folders[1])
    assert isinstance(model, lorafa.PeftModelForCausalLM)
    torch.testing.assert_close(inference(model), expected(*folders), rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.parameters())


def test_arguments_reach_the_one_they_are_about(folders: tuple[Path, Path]) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(
        folders[1], "mine", is_trainable=True, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True,
        autocast_adapter_dtype=False, ignore_base_mismatch=True, use_safetensors=True,
    )  # fmt: skip
    assert list(model.peft_config) == ["mine"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="autocast_adapter_dtypes"):
        AutoPeftModelForCausalLM.from_pretrained(folders[1], autocast_adapter_dtypes=False)


def test_without_a_task_the_class_of_the_base_is_that_of_the_config(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    for kind in (AutoPeftModel, AutoPeftModelForSequenceClassification):
        loaded = kind.from_pretrained(tmp_path / "adapter")
        assert type(loaded.get_base_model()) is transformers.LlamaForSequenceClassification
        torch.testing.assert_close(inference(loaded), inference(model), rtol=0, atol=0)
    named = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["transformers.models"])
    assert type(named.get_base_model()) is transformers.LlamaForSequenceClassification
    with pytest.raises(ConfigError, match=r"cannot be told \(.*import_allowlist=\['trans'\]\)"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["trans"])
    custom = lorafa.get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    custom.save_pretrained(tmp_path / "custom")
    with pytest.raises(
        ConfigError, match=r"no task_type and names no class of transformers.* Use AutoPeftModelForCausalL"
    ):
        AutoPeftModel.from_pretrained(tmp_path / "custom")
    with pytest.raises(
        ConfigError, match=r"does not name its base model \(base_model_name_or_path\)\. Load the base and"
    ):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "custom")
    with pytest.raises(ConfigError, match="AutoPeftModel is not made, but loaded: call its from_pretrained"):
        AutoPeftModel()


def test_a_base_is_resized_for_the_tokens_of_a_tokenizer_beside_the_adapter(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(36)
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = adapted(base, task_type="CAUSAL_LM", **settings)
    model.save_pretrained(tmp_path / "adapter")
    words = {f"w{i}": i for i in range(36)}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    fast.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert inference(loaded).shape[-1] == 36
    torch.testing.assert_close(inference(loaded), inference(model), rtol=1e-6, atol=1e-6)
    small = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    llama().save_pretrained(tmp_path / "other_base")
    other = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other_base"), task_type="CAUSAL_LM")
    other.save_pretrained(tmp_path / "other")
    small.save_pretrained(tmp_path / "other")
    assert len(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "other").get_input_embeddings().weight) == 32


def test_a_base_that_cannot_be_loaded_is_named(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gone = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="/nowhere/at/all")
    with pytest.raises(
        SourceError, match="The base model '/nowhere/at/all' that the adapter names could not be loaded: "
    ):
        AutoPeftModelForCausalLM.from_pretrained(folders[1], config=gone)
    odd = LoraConfig(
        base_model_name_or_path="x", auto_mapping={"base_model_class": "Odd", "parent_library": "transformers.x"}
    )
    with pytest.raises(ConfigError, match=r"was made for a Odd, which transformers .* does not have"):
        AutoPeftModel.from_pretrained(folders[1], config=odd)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match="Run: pip install transformers"):
        AutoPeftModelForCausalLM.from_pretrained(folders[1])
    assert IDS.numel()
