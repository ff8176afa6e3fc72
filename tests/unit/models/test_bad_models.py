"""Model folders as they come from the wild: a missing, damaged or foreign file, and models that are no decoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from lorafa.errors import SourceError
from lorafa.models.load import load_model, resolve_model
from lorafa.models.shapes import shape_model
from lorafa.storage.wheels import scratch_folder
from toys.language_models import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def set_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("text", ["", "[1]", "{", "{}", '{"model_type": "llamax"}'])
def test_a_damaged_config_is_a_source_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"Could not load a .* from the folder '.*model': .* Next step: "):
        load_model(str(folder))


@pytest.mark.parametrize("changes", [{"hidden_size": "32"}, {"num_attention_heads": 5}])
def test_values_a_config_cannot_have_are_a_source_error(folder: Path, changes: dict[str, Any]) -> None:
    set_config(folder, **changes)
    with pytest.raises(SourceError, match=r"Could not load a .*(hidden_size|hidden size).* Next step: "):
        load_model(str(folder))
    with pytest.raises(SourceError, match=r"Could not make a .*(hidden_size|hidden size).* Next step: "):
        shape_model(str(folder))


@pytest.mark.parametrize("size", [0, 30, 5000])
def test_weights_that_were_cut_off_are_a_source_error(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SourceError, match=r"Could not load a causal language model from the folder .* Next step: give"):
        load_model(str(folder))


def test_a_folder_without_a_tokenizer_is_told_which_files_are_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SourceError, match=r"Could not load a tokenizer from .* Next step: put .*tokenizer\.json"):
        load_model(str(folder))


def test_weights_that_are_not_in_the_file_are_not_made_up(folder: Path) -> None:
    set_config(folder, num_hidden_layers=3)
    with pytest.raises(
        SourceError, match=r"lack 9 that the config asks for: model\.layers\.2\.input_layernorm\.weight"
    ):
        load_model(str(folder))


def test_a_model_saved_without_its_head_is_not_given_a_random_one(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(
        SourceError, match=r"lack 1 that the config asks for: lm_head\.weight\. They would be random num"
    ):
        load_model(str(folder))


def test_weights_of_another_shape_are_listed(folder: Path) -> None:
    set_config(folder, intermediate_size=128)
    expected = r"have 6 of another shape: model\.layers\.0\.mlp\.down_proj\.weight \(32x64, the config says 32x128\)"
    with pytest.raises(SourceError, match=expected):
        load_model(str(folder))


def test_weights_the_model_has_no_place_for_are_named(folder: Path) -> None:
    set_config(folder, num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"no place for 9 weights of the folder .*: model\.layers\.1\.input_layernorm"):
        load_model(str(folder))


def test_weights_that_are_not_finite_are_a_source_error(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(SourceError, match=r"is not finite in float32\. Its weights are damaged\.$"):
        load_model(str(folder), "auto")
    with pytest.raises(
        SourceError, match=r"in float16\. Its weights are damaged, or too large .* model\.dtype=float32\.$"
    ):
        load_model(str(folder), "float16")


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(SourceError, match=r"\(BertLMHeadModel\) looks ahead: .* no causal language model.* Give a dec"):
        load_model(str(tmp_path / "bert"), "auto")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_decoder_is_taken_in_every_format(whole: Path, dtype: str) -> None:
    assert isinstance(load_model(str(whole), dtype)[0], LlamaForCausalLM)


def test_a_local_folder_has_no_revisions(whole: Path) -> None:
    with pytest.raises(SourceError, match=r"A local folder has one revision only, found revision='v1' for .*Leave rev"):
        resolve_model(str(whole), revision="v1")


def test_what_was_given_in_place_of_a_model_is_recognized(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no config\.json, .* Give the folder it is in: it holds whole\."):
        resolve_model(str(whole.parent))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds no config\.json, .* It is an adapter: give the base model it was tr"):
        resolve_model(str(tmp_path))


def test_a_cache_that_is_no_folder_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SourceError, match=r"The cache folder .*file cannot be used: File exists\. Next step: name one"),
        scratch_folder(tmp_path / "file", "."),
    ):
        pass
