"""The vocabulary resized while adapters are on: exact where none is on a table, else refused and nothing changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError
from toys.adapters import train
from toys.compare import assert_unchanged, everything

IDS = torch.arange(8, 20)[None]


def llama(size: int = 20, *, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings))
    train(model)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


ON_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "'model.embed_tokens' carries"),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, "'lm_head' carries"),
    "both": ({"target_modules": ["lm_head", "embed_tokens"]}, "'model.embed_tokens', 'lm_head' carry"),
    "copy of the head": ({"modules_to_save": ["lm_head"]}, "'lm_head' carries"),
    "copy of the body": ({"modules_to_save": ["model"], "target_modules": ["lm_head"]}, "'model', 'lm_head' carry"),
    "rows": ({"trainable_token_indices": [3, 4]}, "'model.embed_tokens'"),
    "a parameter": ({"target_modules": [], "target_parameters": ["lm_head.weight"]}, "'lm_head' carries"),
}


@pytest.mark.parametrize("how", ["on the PeftModel", "on the LoraModel"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", ON_TABLES)
def test_under_an_adapter_a_copy_or_rows_it_is_refused_and_nothing_is_changed(case: str, tied: bool, how: str) -> None:
    settings, text = ON_TABLES[case]
    model = adapted(llama(tied=tied), **settings)
    before, expected = everything(model), run(model)
    receiver = model if how == "on the PeftModel" else model.base_model
    with pytest.raises(AdapterError, match=rf"cannot be resized to 24 tokens while {text}.* of 20 tokens"):
        receiver.resize_token_embeddings(24)
    assert_unchanged(before, model)
    assert model.config.vocab_size == 20
    assert torch.equal(run(model), expected)


def test_a_table_that_follows_is_looked_at_too() -> None:
    model = adapted(t5(), target_modules=["decoder.embed_tokens"])
    before = everything(model)
    with pytest.raises(AdapterError, match=r"'decoder\.embed_tokens' carries"):
        model.resize_token_embeddings(24)
    assert_unchanged(before, model)


@pytest.mark.parametrize("case", ON_TABLES)
def test_the_size_that_is_there_changes_nothing(case: str) -> None:
    """As scripts call it, always with ``len(tokenizer)``."""
    model = adapted(llama(), **ON_TABLES[case][0])
    before = everything(model)
    for call in ((20,), (17, 4), ()):
        assert model.resize_token_embeddings(*call) is model.get_input_embeddings()
    assert_unchanged(before, model)
    with pytest.raises(AdapterError, match="to 24 tokens"):
        model.resize_token_embeddings(20, pad_to_multiple_of=8)


@pytest.mark.parametrize("tied", [False, True])
def test_with_adapters_elsewhere_it_is_the_models_own(tied: bool, tmp_path: Path) -> None:
    model = adapted(llama(tied=tied))
    old = run(model, IDS[:, :10])
    found = model.resize_token_embeddings(24, mean_resizing=False)
    assert found is model.get_input_embeddings()
    ids = torch.arange(12, 24)[None]
    assert run(model, ids).shape[-1] == 24
    torch.testing.assert_close(run(model, IDS[:, :10])[..., :20], old)
    assert (model.get_output_embeddings().weight is found.weight) == tied
    assert not found.weight.requires_grad
    model.save_pretrained(tmp_path)
    base = llama(tied=tied)
    base.resize_token_embeddings(24, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[20:] = 7.0  # other new rows than those that were there
    assert torch.equal(run(PeftModel.from_pretrained(base, tmp_path), ids), run(model, ids))


def test_a_model_that_cannot_be_resized_still_cannot() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(AttributeError, match="resize_token_embeddings"):
        model.resize_token_embeddings(24)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_a_wrapper_that_was_replaced_is_named_when_it_is_saved_or_merged(tmp_path: Path, settings: Any) -> None:
    """As a model's own way to resize may replace it, when it is called on the model inside."""
    model = adapted(llama(), **settings)
    inner = model.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        model.merge_adapter()
        model.unmerge_adapter()
    inner.lm_head = nn.Linear(8, 24, bias=False)
    with pytest.warns(UserWarning, match=r"'lm_head' no longer carries .* neither saved nor merged"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'lm_head' no longer carries"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=r"'lm_head' no longer carries"):
        model.merge_and_unload()
