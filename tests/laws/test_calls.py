"""The law of calls: what holds for one call of the model reaches every layer, also when it runs again in backward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa import LoraConfig, PeftModel, get_peft_model, mutate_base, penalty
from lorafa.adapter import AdaptedLayer, Adapter, Extra, Variant
from lorafa.errors import BackendError
from lorafa.spec import LayerSpec
from lorafa.train.trainer import LoraTrainer
from lorafa.variants import VARIANTS
from lorafa.variants.alora import ALoRA

VOCAB, TOKEN = 31, 7


class FromToken(Variant):
    """The update inside counts from the first TOKEN of a row on, and its input is seen from a place that is kept.

    All that a variant may want at once: it depends on the inputs of the model, has a tensor that is not trained and one
    that follows from the others and is in no file, and adds to the loss.
    """

    name = "from_token"
    stage = "gate"
    switch = "alora_invocation_tokens"
    uniform = False
    reads_call = True
    extras = {  # noqa: RUF012
        "place": Extra("lora_place", trained=False),
        "size": Extra("lora_size", trained=False, saved=False),
    }

    def fact(self, arguments: Mapping[str, Any]) -> Tensor:
        """(batch, tokens, 1): 1 where the update counts."""
        return (arguments["input_ids"] == TOKEN).cumsum(dim=1).clamp(max=1)[..., None].float()

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return super().shapes(weight, spec) | {"place": (weight.shape[-1],), "size": (1,)}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        return {"place": torch.full((weight.shape[-1],), 0.5), "size": torch.zeros(1)}

    def changed(self, layer: AdaptedLayer, name: str) -> None:
        super().changed(layer, name)
        with torch.no_grad():
            layer.extra("lora_size", name).fill_(len(layer.adapters))

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        assert self.inner is not None
        return adapter.fact * self.inner.delta_output(adapter, x - adapter.extra("place"), y)

    def penalty(self, adapter: Adapter) -> Tensor:
        return 0.25 * adapter.A.square().sum()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    VARIANTS.remove("alora")  # whose field it takes
    try:
        with VARIANTS.added("from_token", FromToken):
            yield
    finally:
        VARIANTS.add("alora", ALoRA)


CONFIG = hf.LlamaConfig(
    vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, head_dim=4
)


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, init_seed=1,
        alora_invocation_tokens=[TOKEN], **settings,
    )  # fmt: skip


def model_of(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(hf.LlamaForCausalLM(CONFIG), config(**settings))


def ids(first: int, rows: int = 2, tokens: int = 9) -> Tensor:
    """Tokens of which the first TOKEN stands at place ``first``."""
    torch.manual_seed(first)
    found = torch.randint(TOKEN + 1, VOCAB, (rows, tokens))
    found[:, first] = TOKEN
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def test_the_update_counts_where_the_call_says_so() -> None:
    model, tokens = model_of(), ids(4)
    with model.disable_adapter():
        base = model(input_ids=tokens).logits
    changed = (model(input_ids=tokens).logits - base).abs().amax(dim=(0, 2))
    assert bool((changed[:4] == 0).all())
    assert bool((changed[4:] > 1e-4).all())
    assert torch.equal(model(tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_holds_when_layers_run_again_in_the_backward_pass(reentrant: bool) -> None:
    model, tokens = model_of(), ids(4)
    loss_of(model, tokens).backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    loss_of(model, tokens).backward()
    torch.testing.assert_close(gradients(model), wanted)


def test_a_reference_pass_between_forward_and_backward_leaves_the_call_in_place() -> None:
    model, tokens = model_of(), ids(4)
    loss_of(model, tokens).backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    model.train()
    loss = loss_of(model, tokens)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids(2))
    with torch.no_grad():
        model(input_ids=ids(6))
    model.generate(input_ids=ids(3), max_new_tokens=1, do_sample=False)
    loss.backward()
    torch.testing.assert_close(gradients(model), wanted)


def test_two_calls_with_gradients_before_one_backward_are_refused_where_layers_run_again() -> None:
    model = model_of()
    first, second = loss_of(model, ids(4)), loss_of(model, ids(2))
    (first + second).backward()  # nothing runs again
    wanted = gradients(model)
    for tokens in (ids(4), ids(2)):  # one after the other
        loss_of(model, tokens).backward()
    torch.testing.assert_close(gradients(model), wanted)
    model.gradient_checkpointing_enable()
    model.train()
    first = loss_of(model, ids(4))
    with pytest.raises(BackendError, match=r"Two calls with gradients before one backward pass.*checkpointing off"):
        loss_of(model, ids(2))
    first.backward()
    loss_of(model, ids(2)).backward()
    torch.testing.assert_close(gradients(model), wanted)


def test_a_call_whose_graph_is_gone_waits_for_nothing() -> None:
    model = model_of()
    model.gradient_checkpointing_enable()
    model.train()
    loss_of(model, ids(4))
    loss_of(model, ids(2)).backward()


def test_backward_on_another_thread_reads_the_call() -> None:
    model, tokens = model_of(), ids(4)
    loss_of(model, tokens).backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    model.train()
    loss = loss_of(model, tokens)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(gradients(model), wanted)


def test_generation_goes_by_the_prompt() -> None:
    model, tokens = model_of(), ids(4)
    out = model.generate(
        input_ids=tokens, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(out.logits[0], model(input_ids=tokens).logits[:, -1])


def test_a_call_past_the_door_is_refused_and_not_answered_by_an_earlier_one() -> None:
    model, tokens = model_of(), ids(4)
    model(input_ids=tokens)
    with pytest.raises(BackendError, match=r"Adapter 'default' depends on the inputs of the whole model.*PeftModel"):
        model.get_base_model()(input_ids=tokens)


def test_copies_have_calls_of_their_own() -> None:
    model = model_of()
    copied = copy.deepcopy(model)
    wanted = loss_of(model, ids(4))
    torch.testing.assert_close(loss_of(copied, ids(4)), wanted)
    calls = {id(layer.call) for _, layer in copied.base_model.lora_layers()}
    assert calls == {id(copied.base_model.call)}
    assert calls.isdisjoint({id(model.base_model.call)})


def test_a_second_adapter_reads_the_same_call() -> None:
    model, tokens = model_of(), ids(4)
    alone = model(input_ids=tokens).logits
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    torch.testing.assert_close(model(input_ids=tokens).logits, alone)
    model.set_adapter("plain")
    model(input_ids=tokens)
    model.delete_adapter("default")
    model(input_ids=tokens)


def test_merging_what_changes_with_the_input_is_refused_by_name() -> None:
    model = model_of()
    said = r"adapter 'default': its update of '.*q_proj' \(from_token\) changes with the input"
    for function in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BackendError, match="Merging " + said):
            function()
    with pytest.raises(BackendError, match="Taking the start out of the base of " + said):
        mutate_base(model)
    with pytest.raises(BackendError, match="there is no matrix that could be added to the weight"):
        model.base_model.lora_layers()[0][1].get_delta_weight("default")


def test_what_is_not_trained_has_no_gradient_and_what_is_not_saved_is_computed_again(tmp_path: Path) -> None:
    model = model_of()
    layer = model.base_model.lora_layers()[0][1]
    assert {name for name, p in layer.named_parameters() if "lora_place" in name or "lora_size" in name} == set()
    layer.lora_place["default"].weight.fill_(0.25)
    assert layer.lora_size["default"].weight == 1
    model.add_adapter("second", config())
    assert layer.lora_size["default"].weight == 2
    model.delete_adapter("second")
    assert layer.lora_size["default"].weight == 1
    wanted = model(input_ids=ids(4)).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(hf.LlamaForCausalLM(CONFIG), tmp_path)
    assert torch.equal(again(input_ids=ids(4)).logits, wanted)
    assert again.base_model.lora_layers()[0][1].lora_size["default"].weight == 1
    keys = {key for key in model.state_dict() if "lora_size" in key}
    assert keys == set()


def test_the_penalty_is_the_plain_sum_over_layers_of_active_adapters() -> None:
    model = model_of()
    adapters = [layer.adapters["default"] for _, layer in model.base_model.lora_layers()]
    wanted = sum(0.25 * adapter.A.square().sum() for adapter in adapters)
    torch.testing.assert_close(penalty(model), wanted)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("plain")
    assert penalty(model).item() == 0.0
    torch.testing.assert_close(penalty(model, "default"), wanted)


def rows(count: int) -> list[dict[str, list[int]]]:
    found = [ids(2 + number % 4, rows=1)[0].tolist() for number in range(count)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in found]


def trainer_for(folder: Path, model: PeftModel, **settings: Any) -> LoraTrainer:
    args = hf.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
        max_steps=3, max_grad_norm=0, seed=3, **settings,
    )  # fmt: skip
    return LoraTrainer(model, args, train_dataset=rows(12), data_collator=hf.default_data_collator)


def trained(folder: Path, **settings: Any) -> dict[str, Tensor]:
    model = model_of()
    trainer_for(folder, model, **settings).train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_our_trainer_passes_the_door_with_checkpointing_accumulation_and_the_chunked_loss(tmp_path: Path) -> None:
    wanted = trained(tmp_path, per_device_train_batch_size=4)
    start = {name: p for name, p in model_of().named_parameters() if p.requires_grad}
    assert all(not torch.equal(wanted[name], start[name]) for name in wanted)
    for settings in (
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        torch.testing.assert_close(trained(tmp_path, **settings), wanted, rtol=1e-4, atol=1e-5)


def test_our_trainer_adds_the_penalty_once_a_step(tmp_path: Path) -> None:
    model = model_of()
    trainer = trainer_for(tmp_path, model, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    losses: list[float] = []
    take = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: losses.append(float(loss := take(*args, **kwargs))) or loss
    before = penalty(model).item()
    batches = [hf.default_data_collator(rows(2)) for _ in range(2)]
    trainer.current_gradient_accumulation_steps = 2
    with torch.no_grad():
        plain = float(loss_of(model, batches[0]["input_ids"]))
    trainer.training_step(model, dict(batches[0]), num_items_in_batch=torch.tensor(32))
    assert losses[0] == pytest.approx(plain / 2 + before / 2, rel=1e-5)


def test_a_module_of_ones_own_that_checkpoints_its_layers_is_known_by_its_flag() -> None:
    class Net(nn.Module):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.layer, self.embed(input_ids), use_reentrant=False)
            return y

    model = get_peft_model(
        Net(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, alora_invocation_tokens=[TOKEN])
    )
    first = model(ids(4))
    with pytest.raises(BackendError, match="Two calls with gradients"):
        model(ids(2))
    first.sum().backward()
