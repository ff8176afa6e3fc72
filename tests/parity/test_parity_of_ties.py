"""Tied weights beside PEFT: files of either library compute the same in the other, and tied gradients add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorafa
from toys.language_models import IDS, gpt2, llama, logits, seq2seq_logits, t5
from toys.parity import quiet

LLAMA: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_rslora": True},
    "expression": {"target_modules": ".*(q_proj|lm_head)", "init_lora_weights": "gaussian"},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5]},
    "rows of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [2, 5]},
    },
}
APART: dict[str, dict[str, Any]] = {
    "targets": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2, 5], "lm_head": [1]}},
    "rows of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 9]}},
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor], dict[str, Any]]] = {
    "gpt2 head": (gpt2, logits, {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
    "gpt2 saved": (gpt2, logits, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
    "gpt2 rows": (gpt2, logits, {"target_modules": ["c_attn"], "trainable_token_indices": [3], "fan_in_fan_out": True}),
    "t5 rows": (t5, seq2seq_logits, {"target_modules": ["q"], "trainable_token_indices": [3, 5]}),
    "t5 head": (t5, seq2seq_logits, {"target_modules": ["q", "lm_head"]}),
}


def base(make: Callable[[], nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return (llama(tie_word_embeddings=True) if make is None else make()).double().eval()


def adapted(library: Any, model: nn.Module, tying: bool = True, **settings: Any) -> nn.Module:
    with quiet():
        adapter = library.get_peft_model(model, library.LoraConfig(r=4, ensure_weight_tying=tying, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter.eval()


def reloaded(library: Any, model: nn.Module, folder: Path) -> nn.Module:
    with quiet():
        return library.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("case", LLAMA)
def test_tied_adapters_of_either_library_load_in_the_other(tmp_path: Path, case: str) -> None:
    for writer, reader in ((peft, lorafa), (lorafa, peft), (lorafa, lorafa)):
        model = adapted(writer, base(), **LLAMA[case])
        folder = tmp_path / f"{writer.__name__}-{reader.__name__}"
        model.save_pretrained(folder)
        loaded = reloaded(reader, base(), folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)
    assert loaded.merge_and_unload().lm_head.weight.shape == base().lm_head.weight.shape


@pytest.mark.parametrize("case", APART)
def test_what_was_trained_apart_stays_apart(tmp_path: Path, case: str) -> None:
    """A file says whether its copies are tied: a new adapter of lorafa has copies of all ends tied unasked."""
    model = adapted(peft, base(), tying=False, **APART[case])
    model.save_pretrained(tmp_path)
    loaded = reloaded(lorafa, base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)
    with quiet():
        torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", OTHERS)
def test_tied_adapters_of_other_architectures_compute_the_same_in_peft(tmp_path: Path, case: str) -> None:
    make, run, settings = OTHERS[case]
    model = adapted(lorafa, base(make), **settings)
    model.save_pretrained(tmp_path)
    for library in (peft, lorafa):
        loaded = reloaded(library, base(make), tmp_path)
        torch.testing.assert_close(run(loaded), run(model), rtol=1e-12, atol=1e-12)
    expected = run(model)
    with quiet():
        torch.testing.assert_close(run(model.merge_and_unload()), expected, rtol=1e-10, atol=1e-10)


def test_copies_of_the_three_embeddings_of_an_encoder_and_decoder_and_the_head_are_one(tmp_path: Path) -> None:
    """PEFT makes a linear layer of every tied copy, so it cannot run them."""
    model = adapted(lorafa, base(t5), target_modules=["q"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(seq2seq_logits(reloaded(lorafa, base(t5), tmp_path)), seq2seq_logits(model))
    user = model.get_base_model()
    assert user.shared.weight is user.encoder.embed_tokens.weight is user.decoder.embed_tokens.weight
    assert user.shared.weight is user.lm_head.weight


def test_the_shared_factors_get_the_gradients_that_peft_gives_each_end() -> None:
    """PEFT makes two parameters on one storage, which an optimizer moves one after the other."""
    ours, theirs = (adapted(library, base(), **LLAMA["head"]) for library in (lorafa, peft))
    with torch.no_grad():
        others = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            others[name].copy_(parameter)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    user, peers = ours.get_base_model(), theirs.get_base_model()
    embedding, their_embedding, their_head = user.model.embed_tokens, peers.model.embed_tokens, peers.lm_head
    for factor, end in (("A", their_head.lora_B), ("B", their_head.lora_A)):
        own = getattr(embedding, f"lora_embedding_{factor}")["default"].grad
        parts = getattr(their_embedding, f"lora_embedding_{factor}")["default"].grad, end["default"].weight.grad.T
        torch.testing.assert_close(own, parts[0] + parts[1], rtol=1e-10, atol=1e-12)
