"""Models of transformers that read weights of layers they do not call, or hold tables they do not call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import TargetError
from toys.adapters import train

IDS = torch.arange(3, 15)[None]
TINY = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}
BART = TINY | {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "forced_eos_token_id": 2,
}
T5 = TINY | {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def mamba() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    return hf.MambaForCausalLM(hf.MambaConfig(time_step_rank=2, **sizes))


def mamba2() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(num_heads=4, head_dim=8, n_groups=2, chunk_size=4, **sizes))


MIXERS = {"mamba": (mamba, ["in_proj", "x_proj", "dt_proj", "out_proj"]), "mamba2": (mamba2, ["in_proj", "out_proj"])}


@pytest.mark.parametrize("targets", ["all-linear", "each"])
@pytest.mark.parametrize("kind", MIXERS)
def test_state_space_models_train_and_merge_alike(kind: str, targets: str) -> None:
    make, names = MIXERS[kind]
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=targets if targets != "each" else names))
    train(model)
    plain = model.get_base_model()(input_ids=IDS).logits
    assert {path.rpartition(".")[2] for path, _ in model.base_model.lora_layers()} == {*names}
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(input_ids=IDS).logits, plain, rtol=1e-4, atol=1e-4)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)
    merged = copy.deepcopy(model).merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(merged, plain, rtol=1e-3, atol=1e-4)


def test_positions_that_an_encoder_takes_from_the_table_itself_are_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.DebertaV2Config(vocab_size=40, relative_attention=True, pos_att_type=["p2c", "c2p"], **sizes)
    with pytest.raises(TargetError, match=r"rel_embeddings' is never called: the encoder takes its rows"):
        get_peft_model(hf.DebertaV2ForSequenceClassification(config), LoraConfig(target_modules=["rel_embeddings"]))


@pytest.mark.parametrize("kind", MIXERS)
def test_their_convolutions_are_refused(kind: str) -> None:
    with pytest.raises(TargetError, match=r"'backbone\.layers\.0\.mixer\.conv1d' is never called: a kernel takes"):
        get_peft_model(MIXERS[kind][0](), LoraConfig(r=96, target_modules=["conv1d"]))


@pytest.mark.parametrize("name", ["x_proj", "dt_proj", "out_proj"])
def test_kernel_that_takes_the_weights_in_training_gets_the_updates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the fused kernel, which is there on GPUs alone: it is handed weights and calls no layer."""
    from transformers.models.mamba import modeling_mamba

    model = get_peft_model(mamba(), LoraConfig(r=2, target_modules=[name]))
    train(model)
    taken: list[torch.Tensor] = []

    def kernel(x: torch.Tensor, conv: Any, bias: Any, x_proj: Any, dt_proj: Any, out_proj: Any, *rest: Any, **_: Any):  # type: ignore[no-untyped-def]
        taken.extend((x_proj, dt_proj, out_proj))
        return x[:, :16].transpose(1, 2) * (x_proj.sum() + dt_proj.sum() + out_proj.sum())

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", kernel)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    layer = dict(model.base_model.lora_layers())[f"backbone.layers.0.mixer.{name}"]
    found = taken[["x_proj", "dt_proj", "out_proj"].index(name)]
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(found, expected)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


SHARED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), ""),
    "mt5": (lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)), ""),
    "t5 encoder": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), ""),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "model."),
    "mbart": (lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)), "model."),
    "marian": (lambda: hf.MarianMTModel(hf.MarianConfig(**BART)), "model."),
    "pegasus": (lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART)), "model."),
    "m2m": (lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)), "model."),
    "blenderbot": (lambda: hf.BlenderbotForConditionalGeneration(hf.BlenderbotConfig(**BART)), "model."),
}


@pytest.mark.parametrize("kind", SHARED)
def test_shared_table_of_encoder_decoders_is_refused_with_the_modules_that_are_called(kind: str) -> None:
    make, at = SHARED[kind]
    for settings in ({"target_modules": ["shared"]}, {"target_modules": r".*q(_proj)?", "modules_to_save": ["shared"]}):
        with pytest.raises(TargetError, match=rf"'{at}shared' is never called: .* with '{at}encoder\.embed_tokens'"):
            get_peft_model(make(), LoraConfig(r=2, **settings))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["shared"], "ensure_weight_tying": True},
        {"target_modules": r".*q(_proj)?", "modules_to_save": ["shared"], "ensure_weight_tying": True},
        {"target_modules": r".*q(_proj)?", "trainable_token_indices": [4, 5]},
    ],
    ids=str,
)
def test_what_reaches_the_modules_that_are_called_trains(kind: str, settings: dict[str, Any]) -> None:
    model = get_peft_model(SHARED[kind][0](), LoraConfig(r=2, **settings))
    train(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_models_that_call_their_embeddings_take_adapters_there() -> None:
    """Decoders that tie their embedding to the head, and the halves of encoder-decoders."""
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = hf.LlamaConfig(num_attention_heads=2, tie_word_embeddings=True, **sizes)
    for model in (hf.LlamaForCausalLM(config), SHARED["t5"][0](), SHARED["bart"][0]()):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
        train(adapted)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
