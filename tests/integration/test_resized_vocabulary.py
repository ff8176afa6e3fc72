"""Tokens added before training: the file brings the tables that nothing else holds, and says so on a smaller base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lorafa.errors import CheckpointError, ConfigError
from toys.adapters import train
from toys.compare import assert_unchanged, everything
from toys.language_models import llama

transformers = pytest.importorskip("transformers")

NEW = torch.arange(20, 36)[None]
"""Old tokens (0 to 31) and new ones."""
SETTINGS: dict[str, dict[str, Any]] = {
    "q_proj": {"target_modules": ["q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [32, 35]},
}


def stored_base(folder: Path, *, tied: bool = False, **options: Any) -> Path:
    llama(tie_word_embeddings=tied, **options).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def resized(base: nn.Module, size: int = 36, seed: int = 1) -> nn.Module:
    """New rows are drawn at random, as ``resize_token_embeddings`` does."""
    torch.manual_seed(seed)
    base.resize_token_embeddings(size, mean_resizing=False)
    return base


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    settings = SETTINGS["q_proj"] | {"r": 2, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(base, LoraConfig(**settings))
    train(model)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, ids: Tensor = NEW) -> Tensor:
    return model(input_ids=ids).logits


def tables(folder: Path) -> set[str]:
    """The tensors of a file that are the base's."""
    found = {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}
    return {key for key in found if "lora_" not in key and "tokens_delta" not in key}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", SETTINGS)
def test_new_rows_are_in_the_file_and_fill_another_resized_base(tmp_path: Path, case: str, tied: bool) -> None:
    stored_base(tmp_path / "base", tied=tied)
    model = adapted(resized(loaded(tmp_path / "base")), **SETTINGS[case])
    model.save_pretrained(tmp_path / "adapter")
    assert len(tables(tmp_path / "adapter")) == 2
    other = resized(loaded(tmp_path / "base"), seed=2)
    again = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(run(again), run(model))
    again.save_pretrained(tmp_path / "again")
    assert tables(tmp_path / "again") == tables(tmp_path / "adapter")


@pytest.mark.parametrize("case", ["q_proj", "head", "rows"])
def test_peft_reads_the_tables_too(tmp_path: Path, case: str) -> None:
    stored_base(tmp_path / "base")
    model = adapted(resized(loaded(tmp_path / "base")), **SETTINGS[case])
    model.save_pretrained(tmp_path / "adapter")
    other = resized(loaded(tmp_path / "base"), seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    torch.testing.assert_close(run(theirs), run(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["q_proj", "embedding", "rows"])
def test_a_base_that_was_not_resized_is_told_how(tmp_path: Path, case: str) -> None:
    stored_base(tmp_path / "base")
    adapted(resized(loaded(tmp_path / "base")), **SETTINGS[case]).save_pretrained(tmp_path / "adapter")
    base = loaded(tmp_path / "base")
    before = everything(base)
    kind, text = CheckpointError, r"Call model\.resize_token_embeddings\(36\) before loading"
    if case == "rows":
        kind, text = ConfigError, r"35 is outside the 32 rows of .*call model\.resize_token_embeddings"
    with pytest.raises(kind, match=text):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_unchanged(before, base)


@pytest.mark.parametrize("case", ["q_proj", "rows"])
def test_a_vocabulary_as_it_was_is_not_in_the_file(tmp_path: Path, case: str) -> None:
    rows = {"trainable_token_indices": [3]} if case == "rows" else {}
    model = adapted(loaded(stored_base(tmp_path / "base")), **SETTINGS[case] | rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "adapter")
    assert tables(tmp_path / "adapter") == set()


def test_a_base_saved_after_it_was_resized_is_as_it_was(tmp_path: Path) -> None:
    resized(loaded(stored_base(tmp_path / "old"))).save_pretrained(tmp_path / "new")
    model = adapted(loaded(tmp_path / "new"))
    model.save_pretrained(tmp_path / "adapter")
    assert tables(tmp_path / "adapter") == set()
    assert torch.equal(run(PeftModel.from_pretrained(loaded(tmp_path / "new"), tmp_path / "adapter")), run(model))


def test_a_size_that_the_config_leaves_at_its_default_is_known(tmp_path: Path) -> None:
    """transformers may leave it out of the file."""
    stored_base(tmp_path / "base", vocab_size=32000, num_hidden_layers=1)
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    del values["vocab_size"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    model = adapted(loaded(tmp_path / "base"))
    assert not any("embed" in key for key in get_peft_model_state_dict(model))
    model = adapted(resized(loaded(tmp_path / "base"), 32001))
    assert any("embed" in key for key in get_peft_model_state_dict(model))


def test_without_its_folder_the_model_itself_tells(tmp_path: Path) -> None:
    stored_base(tmp_path / "base")
    models = {size: adapted(resized(loaded(tmp_path / "base"), size)) for size in (32, 36)}
    shutil.rmtree(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("embed" in key for key in get_peft_model_state_dict(models[32]))
        assert any("embed" in key for key in get_peft_model_state_dict(models[36]))


def gpt2(folder: Path) -> nn.Module:
    """A model that keeps no size beside that of its config."""
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return loaded(folder)


def test_where_nothing_tells_saving_says_so_and_two_settings_silence_it(tmp_path: Path) -> None:
    model = adapted(resized(gpt2(tmp_path / "base")), target_modules=["c_attn"], fan_in_fan_out=True)
    assert any("wte" in key for key in get_peft_model_state_dict(model))
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"resized is not known: no config\.json of .*save_embedding_layers=True"):
        assert not any("wte" in key for key in get_peft_model_state_dict(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert any("wte" in key for key in get_peft_model_state_dict(model, save_embedding_layers=True))
        assert not any("wte" in key for key in get_peft_model_state_dict(model, save_embedding_layers=False))


def test_a_base_on_the_hub_is_compared_with_its_copy_on_this_disk_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    cache = tmp_path / "models--someone--base" / "snapshots" / ("1" * 40)
    stored_base(cache)
    (tmp_path / "models--someone--base" / "refs").mkdir()
    (tmp_path / "models--someone--base" / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    for size, held in ((32, False), (36, True)):
        base = resized(gpt2(tmp_path / "gpt2"), size)
        base.name_or_path = base.config._name_or_path = "someone/base"
        model = adapted(base, target_modules=["c_attn"], fan_in_fan_out=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert any("wte" in key for key in get_peft_model_state_dict(model)) == held


def test_a_bias_of_the_head_grows_with_it_and_is_in_the_file_too(tmp_path: Path) -> None:
    config = transformers.PhiConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "base")
    base = resized(loaded(tmp_path / "base"))
    base.lm_head.bias.data.normal_()
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    assert tables(tmp_path / "adapter") == {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    again = PeftModel.from_pretrained(resized(loaded(tmp_path / "base"), seed=2), tmp_path / "adapter")
    assert torch.equal(run(again), run(model))


def test_different_tables_are_not_loaded_into_one(tmp_path: Path) -> None:
    model = adapted(resized(loaded(stored_base(tmp_path / "base"))))
    model.save_pretrained(tmp_path / "adapter")
    base = resized(llama(tie_word_embeddings=True))
    before = everything(base)
    with pytest.raises(CheckpointError, match=r"different tables 'model.embed_tokens.weight' and 'lm_head.weight'"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", ignore_base_mismatch=True)
    assert_unchanged(before, base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    PeftModel.from_pretrained(base, tmp_path / "adapter", ignore_base_mismatch=True)


def test_a_setting_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save_embedding_layers has no value 'always'. Pass True, False or 'auto'"):
        adapted(llama()).save_pretrained(tmp_path / "adapter", save_embedding_layers="always")
    assert not (tmp_path / "adapter").exists()
