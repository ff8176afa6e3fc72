"""The balance loss of GOAT: its value and gradients, the calls it is gathered in, padding, trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa import PeftModel, get_peft_model, penalty
from lorafa.errors import AdapterError, BackendError
from toys.adapters import only_layer, train
from toys.compare import close
from toys.goat import IN, E, One, adapted, config, inputs
from toys.models import Two


def balance(gates: Tensor, top_k: int, c: float = 1e-3) -> Tensor:
    """c E sum_i f_i P_i over tokens (T, E)."""
    chosen = gates.topk(top_k, dim=-1).indices.flatten()
    f = torch.stack([(chosen == i).double().mean() for i in range(E)])
    return c * E * (f * gates.mean(0)).sum()


def two(**settings: Any) -> PeftModel:
    """Two layers, so that the gates of the second have a gradient for the factors of the first."""
    model = get_peft_model(Two(IN, 11, 12).double(), config(("first", "second"), **settings))
    torch.manual_seed(2)
    train(model)
    return model


def gates_of(model: PeftModel, x: Tensor) -> list[Tensor]:
    """(tokens, E) of both layers, from the outputs."""
    seen: list[Tensor] = []
    layers = [layer for _, layer in model.base_model.lora_layers()]
    handles = [layer.register_forward_hook(lambda _, args, __: seen.append(args[0])) for layer in layers]
    model.get_base_model()(x)
    for handle in handles:
        handle.remove()
    routers = [layer.lora_router["default"].weight for layer in layers]
    return [(h @ R.T).softmax(-1).flatten(0, -2) for h, R in zip(seen, routers, strict=True)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_penalty_is_that_of_the_paper_with_its_gradients(top_k: int) -> None:
    model, x = two(top_k=top_k, balance=0.5), inputs()
    wanted = sum(balance(gates, top_k, 0.5) for gates in gates_of(model, x))
    own = [p for p in model.parameters() if p.requires_grad]
    model(x)
    found = penalty(model)
    close(found, wanted)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(wanted, own, allow_unused=True)  # type: ignore[arg-type]
    for mine, each in zip(torch.autograd.grad(found, own, allow_unused=True), theirs, strict=True):
        assert (mine is None) == (each is None)
        if mine is not None:
            close(mine, each, 1e-9)
    assert sum(bool(each.any()) for each in theirs if each is not None) >= 3, "the factors of the first layer, too"


def test_experts_used_alike_cost_c_and_one_used_alone_e_times_that() -> None:
    model = adapted(top_k=1, balance=0.5)
    router = only_layer(model).lora_router["default"].weight
    with torch.no_grad():
        router.zero_()[:, :E] = 100 * torch.eye(E)
    model(torch.eye(IN, dtype=torch.float64)[:E])
    close(penalty(model), torch.tensor(0.5))
    model(torch.eye(IN, dtype=torch.float64)[:1])
    close(penalty(model), torch.tensor(0.5 * E))


class Checkpointed(nn.Module):
    gradient_checkpointing = True

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = Two(IN, 11, 12).double(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return y


def test_layers_that_run_again_in_the_backward_pass_are_counted_once() -> None:
    model, x = two(balance=0.5), inputs()
    again = get_peft_model(Checkpointed(reentrant=False), config(("first", "second"), balance=0.5))
    own, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (model, again))
    with torch.no_grad():
        for mine, other in zip(own, theirs, strict=True):
            other.copy_(mine)
    for each in (model, again):
        for _ in range(2):  # gradients of two steps, each with the penalty of its own call
            (each(x).square().sum() + penalty(each)).backward()
    for mine, other in zip(own, theirs, strict=True):
        close(other.grad, mine.grad, 1e-9)  # type: ignore[arg-type]
    before = penalty(model)
    close(penalty(again), before)


def test_reentrant_checkpointing_is_refused_where_the_penalty_would_lose_its_gradient() -> None:
    model, x = get_peft_model(Checkpointed(reentrant=True), config(("first", "second"))), inputs().requires_grad_()
    y = model(x)
    with pytest.raises(BackendError, match=r"ran without gradients in a call with them: re.*use_reentrant=False"):
        penalty(model)
    with torch.no_grad():
        assert penalty(model) > 0
    y.sum().backward()


def test_the_penalty_is_that_of_the_last_call_with_gradients() -> None:
    model, x = two(), inputs()
    with pytest.raises(AdapterError, match=r"'default' has a balance loss over the tokens of the last call with"):
        penalty(model)
    model(x)
    wanted = penalty(model).item()
    with torch.no_grad():
        model(inputs(2))
    model.get_base_model()(inputs(2))  # past the door
    assert penalty(model).item() == wanted
    model(inputs(2))
    assert penalty(model).item() != wanted
    with model.disable_adapter():
        model(x)
    assert penalty(model).item() == 0
    assert penalty(two(balance=0)).item() == 0


def test_a_layer_that_is_used_twice_counts_both_uses() -> None:
    class Twice(One):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + self.layer(-2 * x)
            return y

    model, x = get_peft_model(Twice(), config()), inputs()
    router = only_layer(model).lora_router["default"].weight
    model(x)
    tokens = torch.cat([x.flatten(0, 1), -2 * x.flatten(0, 1)])
    close(penalty(model), balance((tokens @ router.T).softmax(-1), 2))


LLAMA = hf.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
)
IDS = torch.tensor([[3, 4, 7, 9, 5, 7, 9, 6], [7, 9, 3, 4, 5, 0, 0, 0]])


def llama(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(hf.LlamaForCausalLM(LLAMA), config(("q_proj", "down_proj"), r=4, **settings))
    train(model)
    return model


def test_padding_is_left_out_of_the_balance() -> None:
    model = llama()
    mask = (IDS != 0).long()
    model(IDS, attention_mask=mask)
    padded = penalty(model)
    wide = torch.cat([IDS, torch.full((2, 3), 11)], dim=1)
    model(wide, attention_mask=torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], dim=1))
    torch.testing.assert_close(penalty(model), padded)
    model(IDS)
    assert abs(penalty(model).item() - padded.item()) > 1e-7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_of_transformers_gets_it_by_one_line(tmp_path: Path, checkpointing: bool) -> None:
    """Two steps by hand and by transformers' own trainer, which then trains on the same sum."""

    class Trainer(hf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, **kwargs) + penalty(model)

    model, other = llama(balance=0.5), llama(balance=0.5)
    args = hf.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=2,
        per_device_train_batch_size=2, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    row = {"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist(), "attention_mask": [1] * 8}
    Trainer(model, args, train_dataset=[row] * 4, data_collator=hf.default_data_collator).train()
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    ids = IDS[:1].expand(2, -1)
    for _ in range(2):
        (other(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss + penalty(other)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
