"""The chunked loss is the model's own loss, with the same gradients and a fraction of the memory."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import BackendError, DataError
from lorafa.models.head_loss import (
    HiddenStates,
    LogitTransform,
    SupervisedLoss,
    supervised_loss,
    supervised_nll,
    supports_chunked_loss,
)
from toys.watch import Allocated

VOCAB, HIDDEN, BATCH, TOKENS = 211, 16, 3, 12
SMALL = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 24}
CONFIGS: dict[str, hf.PretrainedConfig] = {
    "llama": hf.LlamaConfig(**LLAMA_LIKE),
    "gpt2": hf.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=32),
    "gemma2 (softcap)": hf.Gemma2Config(**LLAMA_LIKE, head_dim=8, final_logit_softcapping=0.3, query_pre_attn_scalar=8),
    "cohere (logit_scale)": hf.CohereConfig(**LLAMA_LIKE, logit_scale=0.0625),
    "granite (logits_scaling)": hf.GraniteConfig(**LLAMA_LIKE, logits_scaling=8.0),
    "phi (head with bias)": hf.PhiConfig(**SMALL, intermediate_size=24, partial_rotary_factor=0.5),
}


def causal_lm(name: str = "llama", **changes: Any) -> nn.Module:
    """A tiny random model with dropout off, whose logits are large enough for a transform of them to matter."""
    config = copy.deepcopy(CONFIGS[name])
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **changes})
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch_of(seed: int = 0, rows: int = BATCH, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Right-padded rows of unequal length, whose first third is a prompt that is not trained on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    labels = ids.masked_fill(~mask | (torch.arange(tokens) < tokens // 3), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(model: nn.Module, own: Tensor, ours: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, own, rtol=tolerance, atol=tolerance)
    expected, found = gradients(model, own), gradients(model, ours)
    assert expected.keys() == found.keys()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_all_gradients_equal_those_of_the_model_with_a_trainable_head(
    name: str, chunk_tokens: int | None
) -> None:
    model, batch = causal_lm(name), batch_of()
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch, chunk_tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_all_gradients_equal_those_of_the_model_with_a_frozen_head(name: str) -> None:
    model, batch = causal_lm(name, tie_word_embeddings=False), batch_of()
    model.get_output_embeddings().requires_grad_(False)
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch))


def test_loss_and_adapter_gradients_equal_those_of_an_adapted_model() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model, batch = get_peft_model(causal_lm(), config), batch_of()
    assert supports_chunked_loss(model) is None
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch))


def test_dividing_by_the_items_of_the_whole_step_equals_the_model() -> None:
    model, batch = causal_lm(), batch_of()
    for items in (41, torch.tensor(41)):
        own = model(**batch, num_items_in_batch=items).loss
        assert_same_loss_and_gradients(model, own, supervised_loss(model, batch, num_items=items))


def test_shifted_labels_are_not_shifted_again() -> None:
    model, batch = causal_lm(), batch_of()
    own = model(**batch).loss
    labels = batch.pop("labels")
    batch["shift_labels"] = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(supervised_loss(model, batch), own)


def test_sum_and_count_are_over_the_labels_that_have_a_predecessor() -> None:
    model, batch = causal_lm(), batch_of()
    batch["labels"][:, 0] = 3  # position 0 has nothing before it to be predicted from
    total, count = supervised_nll(model, batch)
    assert count == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(total / count, model(**batch).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_loss_equals_the_model_under_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = causal_lm(), batch_of()
    own = model(**batch).loss
    expected = gradients(model, own)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, supervised_loss(model, batch))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_loss_equals_the_model_under_autocast() -> None:
    model, batch = causal_lm(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        own, ours = model(**batch).loss, supervised_loss(model, batch)
    assert ours.dtype == torch.float32
    assert_same_loss_and_gradients(model, own, ours, tolerance=2e-2)


def test_loss_equals_the_model_in_bfloat16() -> None:
    model, batch = causal_lm().to(torch.bfloat16), batch_of()
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch), tolerance=3e-2)


@pytest.mark.slow
def test_compiled_loss_equals_the_model() -> None:
    model, batch = causal_lm(), batch_of()
    compiled = torch.compile(SupervisedLoss(model), backend="eager")
    for rows in (BATCH, BATCH + 1):  # another number of supervised tokens, so another number of chunks
        batch = batch_of(rows, rows)
        assert_same_loss_and_gradients(model, model(**batch).loss, compiled(batch))


def cut_to_one_gradient(model: nn.Module) -> nn.Module:
    """Only the last norm before the head is trained, so that no gradient but that of the hidden states is taken."""
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    return model


def test_full_logits_are_never_allocated() -> None:
    model, batch = cut_to_one_gradient(causal_lm()), batch_of(rows=4, tokens=24)
    with Allocated() as seen:
        supervised_loss(model, batch, 24).backward()
    assert seen.largest == 24 * VOCAB  # all else is smaller, the attention's 4 * 2 * 24 * 24 too
    with Allocated() as seen:
        model(**batch)
    assert seen.largest >= 4 * 24 * VOCAB


def states_of(hidden: Tensor, model: nn.Module) -> HiddenStates:
    return HiddenStates(hidden, model.get_output_embeddings(), LogitTransform())


def saved_tensors(run: Any) -> list[Tensor]:
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        run()
    return saved


def test_a_cpu_makes_logits_of_few_sizes() -> None:
    model, rows = causal_lm(), set()
    for count in (1, 2, 17, 31, 32, 33, 50, 63, 64, 65, 78):
        labels = torch.full((80,), -100).index_fill(0, torch.arange(count), 3).view(2, 40)
        batch = {"input_ids": torch.ones(2, 40, dtype=torch.long), "shift_labels": labels}
        with Allocated() as seen, torch.no_grad():
            supervised_nll(model, batch)
        rows.add(seen.largest // VOCAB)
    assert rows == {32, 64, 96}


def test_only_the_gradient_of_the_supervised_rows_is_saved() -> None:
    """Beside what the body saves, which is what it saves without a loss."""
    model, batch = cut_to_one_gradient(causal_lm()), batch_of()
    count = int((batch["labels"][:, 1:] != -100).sum())
    body = saved_tensors(lambda: model.model(input_ids=batch["input_ids"]))
    saved = saved_tensors(lambda: supervised_nll(model, batch, 4))
    floats, positions = (
        [sum(t.nbytes if real else t.numel() for t in one if t.is_floating_point() is real) for one in (saved, body)]
        for real in (True, False)
    )
    assert floats[0] - floats[1] == count * HIDDEN * 4
    assert positions[0] - positions[1] <= count  # where the rows came from


def test_nothing_is_saved_without_gradients() -> None:
    model, batch = causal_lm(), batch_of()
    with torch.no_grad():
        assert not saved_tensors(lambda: supervised_loss(model, batch))
        without = supervised_loss(model, batch)
    torch.testing.assert_close(without, supervised_loss(model, batch).detach())


def test_batch_whose_labels_are_all_masked_is_refused() -> None:
    batch = batch_of()
    batch["labels"].fill_(-100)
    with pytest.raises(DataError, match=r"All 36 labels of the batch are masked \(-100\).*max_length"):
        supervised_loss(causal_lm(), batch)


def test_batch_without_labels_is_refused() -> None:
    batch = batch_of()
    del batch["labels"]
    with pytest.raises(DataError, match="needs 'labels', found only: attention_mask, input_ids"):
        supervised_loss(causal_lm(), batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_known_architectures_are_supported(name: str) -> None:
    model = causal_lm(name)
    assert supports_chunked_loss(model) is None
    assert all(module.training for module in model.modules())


class OddHead(nn.Linear):
    pass


def adapted_head(**config: Any) -> nn.Module:
    return get_peft_model(causal_lm(tie_word_embeddings=False), LoraConfig(r=4, **config))


def other_head() -> nn.Module:
    model = causal_lm(tie_word_embeddings=False)
    model.set_output_embeddings(OddHead(HIDDEN, VOCAB))
    return model


def hooked_head() -> nn.Module:
    model = causal_lm()
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 2)
    return model


def unknown_transform() -> nn.Module:
    class Halved(hf.LlamaForCausalLM):
        def forward(self, labels: Tensor, **inputs: Any) -> Any:
            logits = self.lm_head(self.model(**inputs)[0]) / 2
            return hf.modeling_outputs.CausalLMOutput(self.loss_function(logits, labels, VOCAB), logits)

    model = Halved(causal_lm().config)
    model.load_state_dict(causal_lm().state_dict())
    return model


def router() -> nn.Module:
    config = hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=2, output_router_logits=True)
    return hf.MixtralForCausalLM(config)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return hf.LlamaForCausalLM(CONFIGS["llama"])


def broken() -> nn.Module:
    model = causal_lm()
    model.model.layers[0].mlp = nn.Linear(3, 3)
    return model


UNSUPPORTED = {
    "an adapted head": (
        lambda: adapted_head(target_modules=["lm_head"]),
        r"output head is not a plain nn.Linear but lorafa\.layers",
    ),
    "a trained copy of the head": (
        lambda: adapted_head(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        r"output head is not a plain nn.Linear but lorafa\.layers",
    ),
    "another kind of head": (other_head, "output head is not a plain nn.Linear but .*OddHead"),
    "a hooked head": (hooked_head, "output head has hooks"),
    "an unknown transform": (
        unknown_transform,
        r"on a few tokens the model's own loss is \d+\.\d+ and the chunked loss",
    ),
    "a router loss": (router, "MixtralForCausalLM adds a router loss"),
    "an encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1, num_heads=2)
        ),
        "is an encoder-decoder model",
    ),
    "a body": (lambda: causal_lm().model, "LlamaModel has no separate body and output head"),
    "a plain module": (lambda: nn.Linear(3, 3), "Linear is not a transformers model"),
    "the meta device": (on_meta, "no weights yet"),
    "a model that fails": (broken, r"trial with a few tokens failed \(RuntimeError"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_model_that_cannot_be_cut_gets_the_reason(case: str) -> None:
    make, reason = UNSUPPORTED[case]
    problem = supports_chunked_loss(make())
    assert problem is not None
    assert re.search(reason, problem)


def test_loss_of_a_model_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(BackendError, match=r"chunked loss cannot be used: the output head has hooks.*model's own loss"):
        supervised_loss(hooked_head(), batch_of())


def test_padding_behind_the_tokens_keeps_no_attention_mask_for_backward() -> None:
    model, batch = causal_lm(attn_implementation="sdpa"), batch_of()
    model.set_attn_implementation("sdpa")
    squares: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (TOKENS, TOKENS):
            squares.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        supervised_loss(model, batch)
    assert not squares
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch))


@pytest.mark.parametrize("damage", ["padding in front", "padding between", "a label on padding"])
def test_padding_that_could_matter_keeps_its_mask(damage: str) -> None:
    model, batch = causal_lm(), batch_of()
    if damage == "padding in front":
        batch = {key: value.flip(1) for key, value in batch.items()}
    elif damage == "padding between":
        batch["attention_mask"][:, 3] = 0
    else:
        batch["labels"] = batch["input_ids"].clone()
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch))


def test_positions_of_packed_rows_keep_the_mask() -> None:
    """transformers looks for packed sequences in position_ids only where there is no mask."""
    model = causal_lm()
    ids = batch_of(rows=1)["input_ids"]
    positions = torch.arange(TOKENS).remainder(TOKENS // 2).unsqueeze(0)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "position_ids": positions}
    assert_same_loss_and_gradients(model, model(**batch).loss, supervised_loss(model, batch))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (
            torch.zeros(BATCH, TOKENS - 2, dtype=torch.long),
            r"The labels are of shape \(3, 10\), and the model's positions",
        ),
        (torch.zeros(BATCH, TOKENS + 1, dtype=torch.long), r"The labels are of shape \(3, 13\)"),
        (torch.full((BATCH, TOKENS), VOCAB), r"Labels must be integers from 0 to 210, or -100 .*, found 211"),
        (torch.full((BATCH, TOKENS), -1), r"found -1"),
        (torch.zeros(BATCH, TOKENS), r"found torch\.float32"),
    ],
)
def test_labels_that_are_none_of_the_tokens(labels: Tensor, text: str) -> None:
    with pytest.raises(DataError, match=text):
        supervised_loss(causal_lm(), batch_of() | {"labels": labels})
