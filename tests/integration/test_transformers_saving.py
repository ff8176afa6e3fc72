"""Whole transformers models saved, merged, resized and unloaded: tied weights stay tied where they can."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafa
from lorafa import PeftModel
from toys.language_models import (
    IDS,
    adapted,
    bart,
    inference,
    llama,
    loss_and_gradients,
    seq2seq_logits,
    switch,
    t5,
)

transformers = pytest.importorskip("transformers")


def test_a_merged_model_is_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    merged = adapted().merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(inference(loaded), inference(merged))
    assert loaded.state_dict().keys() == llama().state_dict().keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["embedding", "head", "copied head", "copied embedding"],
)
def test_merging_one_end_of_tied_weights_unties_them_and_keeps_the_outputs(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = adapted(llama(tie_word_embeddings=True), **settings)
    expected = inference(model)
    with pytest.warns(UserWarning, match="config.tie_word_embeddings was set to False"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(inference(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(inference(loaded), inference(merged))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"target_modules": r".*\.q(_proj)?", "modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize(("make", "says"), [(bart, False), (t5, True), (switch, True)])
def test_a_head_of_its_own_keeps_the_outputs_of_models_with_two_halves(
    make: Callable[[], Any], says: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    """BART's halves share the table that its head is untied from; T5's config cannot say that a head is untied, and
    Switch Transformers scale their outputs where it says tied."""
    model = adapted(make(), **settings).eval()
    expected = seq2seq_logits(model)
    with pytest.warns(UserWarning, match="hold different weights" + (", and the config.* stays True" if says else "")):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is says
    torch.testing.assert_close(seq2seq_logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded, told = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    torch.testing.assert_close(seq2seq_logits(loaded.eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]},
    ],
    ids=["untouched", "both ends copied", "token rows"],
)
def test_tied_weights_that_change_together_stay_tied(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted(llama(tie_word_embeddings=True), **settings)
    expected = inference(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(inference(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(inference(loaded), inference(merged))


def test_copies_of_tied_weights_are_trained_as_one() -> None:
    model = adapted(
        llama(tie_word_embeddings=True), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    inner = model.get_base_model()
    ends = [inner.model.embed_tokens.modules_to_save["default"], inner.lm_head.modules_to_save["default"]]
    assert ends[0].weight is ends[1].weight
    loss_and_gradients(model.train())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(ends[0].weight, ends[1].weight)
    assert not torch.equal(ends[0].weight, inner.model.embed_tokens.original_module.weight)


def test_the_embeddings_of_t5_are_adapted_in_encoder_and_decoder(tmp_path: Path) -> None:
    model = adapted(t5(), target_modules=["embed_tokens"]).eval()
    assert len(model.get_layer_status()) == 2
    with torch.no_grad():
        expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        results = [m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (merged, loaded)]
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1], expected, rtol=1e-5, atol=1e-5)


def run_t5(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits
    return logits


@pytest.mark.parametrize("rows", [[2, 5], {"shared": [2, 5]}], ids=["of the input embedding", "of shared"])
def test_the_shared_table_of_t5_is_one_table_again_once_trained_rows_are_merged(tmp_path: Path, rows: Any) -> None:
    base = t5()
    before, count = run_t5(base), sum(p.numel() for p in base.parameters())
    model = adapted(base, target_modules=["q"], trainable_token_indices=rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected = run_t5(model)
    assert not torch.allclose(expected, before), "the rows count where the modules that follow are called"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload()
    ends = [merged.shared, merged.encoder.embed_tokens, merged.decoder.embed_tokens, merged.lm_head]
    assert len({id(end.weight) for end in ends}) == 1
    assert merged.config.tie_word_embeddings is True
    assert sum(p.numel() for p in merged.parameters()) == count
    torch.testing.assert_close(run_t5(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(run_t5(loaded), run_t5(merged))


def test_rows_of_two_adapters_are_merged_into_one_table_each_time() -> None:
    model = adapted(t5(), target_modules=["q"], trainable_token_indices=[2, 5])
    model.add_adapter("b", lorafa.LoraConfig(r=4, target_modules=["q"], trainable_token_indices=[3]))
    model.base_model.set_adapter(["default", "b"])
    expected = run_t5(model)
    merged = model.merge_and_unload()
    assert merged.decoder.embed_tokens.weight is merged.shared.weight
    torch.testing.assert_close(run_t5(merged), expected, rtol=1e-5, atol=1e-5)


def test_unloading_a_transformer_gives_the_pristine_model_back() -> None:
    base = llama(tie_word_embeddings=True)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    kinds = [type(module) for module in base.modules()]
    model = adapted(base, target_modules=["q_proj", "embed_tokens"], trainable_token_indices=None)
    model.merge_adapter()
    plain = model.unload()
    assert plain is base
    assert [type(module) for module in plain.modules()] == kinds
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_an_adapter_with_new_rows_is_loaded_on_a_resized_model(tmp_path: Path) -> None:
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(36)
    model = adapted(base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path)
    other = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(9)
        other.resize_token_embeddings(36)  # new rows at random, other ones than before
    assert not torch.equal(other.model.embed_tokens.weight, llama().model.embed_tokens.weight[:36])
    loaded = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(inference(loaded), inference(model))


def test_an_adapter_for_a_resized_model_says_so_on_the_old_one(tmp_path: Path) -> None:
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(36)
    adapted(base, target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    with pytest.raises(lorafa.errors.CheckpointError, match=r"Call model.resize_token_embeddings\(36\) before loading"):
        PeftModel.from_pretrained(llama(), tmp_path)
