"""The supervised loss goes through the model's door: hooks run, other objectives read its states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import BackendError, DataError
from lorafa.models.head_loss import HiddenStates, SupervisedLoss, supervised_loss, supervised_nll, supports_chunked_loss

VOCAB, BATCH, TOKENS = 53, 3, 12


def causal_lm() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def batch_of() -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(VOCAB, (BATCH, TOKENS))
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens.masked_fill(torch.arange(TOKENS) < 4, -100),
    }


class Distance:
    """The squared distance of two inner states at supervised positions, as an alignment would have it."""

    layers = (0, 2)

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        counts = targets != -100
        return (states.inner[2] - states.inner[0])[counts].square().sum(), int(counts.sum())


def test_another_objective_reads_the_inner_states_it_names() -> None:
    model, batch = causal_lm(), batch_of()
    output = model(**{key: value for key, value in batch.items() if key != "labels"}, output_hidden_states=True)
    counts = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    wanted = (output.hidden_states[2] - output.hidden_states[0])[counts].square().sum()
    torch.testing.assert_close(supervised_loss(model, batch, objective=Distance()), wanted / counts.sum())
    torch.testing.assert_close(SupervisedLoss(model, objective=Distance())(batch, 7), wanted / 7)
    assert supervised_nll(model, batch, objective=Distance())[1] == counts.sum()


def test_an_objective_that_names_a_layer_the_model_does_not_have_is_refused() -> None:
    objective = Distance()
    objective.layers = (0, 3)
    with pytest.raises(BackendError, match=r"reads the states after layer 3, and the model has 2 layers\. Name layers"):
        supervised_loss(causal_lm(), batch_of(), objective=objective)


def adapted_lm() -> nn.Module:
    return get_peft_model(causal_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def test_hooks_on_the_model_and_on_what_wraps_it_run_and_see_its_arguments() -> None:
    model, batch, seen = adapted_lm(), batch_of(), []
    wraps = {"peft": model, "lora": model.base_model, "causal": model.get_base_model()}
    for name, module in wraps.items():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.append((name, sorted(kwargs))), with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output, name=name: seen.append((name, output.logits)))
    supervised_loss(model, batch)
    arguments = ["attention_mask", "input_ids", "labels"]
    assert seen[:3] == [("peft", arguments), ("lora", arguments), ("causal", arguments)]
    assert seen[3:] == [("causal", None), ("lora", None), ("peft", None)]


def test_what_hooks_do_to_inputs_and_loss_counts() -> None:
    model, batch = adapted_lm(), batch_of()
    wanted = supervised_loss(model, {**batch, "input_ids": (batch["input_ids"] + 1) % VOCAB})

    def shift(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % VOCAB}

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        output.loss = 2 * output.loss
        return output

    model.register_forward_pre_hook(shift, with_kwargs=True)
    model.base_model.register_forward_hook(double)
    torch.testing.assert_close(supervised_loss(model, batch), 2 * wanted)
    torch.testing.assert_close(model(**batch).loss, supervised_loss(model, batch))


def test_a_hook_that_takes_the_loss_away_is_told() -> None:
    model = adapted_lm()
    model.register_forward_hook(lambda module, args, output: (1, 2))
    with pytest.raises(BackendError, match=r"has replaced its output by tuple, which has no loss\. Let the hook"):
        supervised_loss(model, batch_of())


def test_the_model_has_its_own_forward_again_afterwards_whatever_happens() -> None:
    model = adapted_lm()
    causal = model.get_base_model()
    supervised_loss(model, batch_of())
    with pytest.raises(DataError):
        supervised_loss(model, {**batch_of(), "labels": torch.full((BATCH, TOKENS), -100)})
    assert "forward" not in vars(causal)
    assert model(**batch_of()).logits.shape == (BATCH, TOKENS, VOCAB)


def test_a_forward_that_is_replaced_on_the_model_itself_is_not_passed_by() -> None:
    model = causal_lm()
    own = model.forward
    model.forward = lambda **inputs: own(**inputs)
    assert "replaced on the object itself, and would not run" in supports_chunked_loss(model)


def test_hooks_of_accelerate_run_around_the_loss() -> None:
    seen: list[str] = []

    class Note(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append("before")
            return args, kwargs

    model, batch = causal_lm(), batch_of()
    wanted = supervised_loss(model, batch)
    add_hook_to_module(model, Note())
    assert supports_chunked_loss(model) is None
    seen.clear()
    torch.testing.assert_close(supervised_loss(model, batch), wanted)
    assert seen == ["before"]
