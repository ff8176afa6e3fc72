"""``lorafa.check_gradients``: an adapter that trains nothing is named after the first backward pass, and why."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa import LoraConfig, check_gradients, get_peft_model
from lorafa.errors import AdapterError, TrainingError


class Reads(nn.Module):
    """Multiplies by the weight of ``read`` and never calls it; nobody knows its class."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.embed = nn.Embedding(5, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.called(self.embed(ids)) @ self.read.weight.T
        return self.head(hidden)


IDS = torch.tensor([[0, 1], [2, 3]])


def ran(targets: Any, library: ModuleType = lorafa, model: nn.Module | None = None, **settings: Any) -> Any:
    """A model after its first backward pass."""
    torch.manual_seed(0)
    config = library.LoraConfig(r=2, target_modules=targets, **settings)
    adapted = library.get_peft_model(Reads() if model is None else model, config)
    adapted(IDS).square().sum().backward()
    return adapted


@pytest.mark.parametrize("library", [lorafa, peft], ids=["lorafa", "peft"])
def test_layer_that_is_read_and_never_called_is_named_with_the_cause(library: ModuleType) -> None:
    check_gradients(ran(["called"], library))
    with pytest.raises(
        TrainingError,
        match=r"1 of 2 adapted layers got no gradient: read\. .* reads their weight and never calls them, or",
    ):
        check_gradients(ran(["called", "read"], library))


def test_plain_loop_stops_before_the_optimizer_moves_anything() -> None:
    model = get_peft_model(Reads(), LoraConfig(r=2, target_modules=["called", "read"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    with pytest.raises(TrainingError, match="read"):  # noqa: PT012
        for step in range(2):
            model(IDS).square().sum().backward()
            if step == 0:
                check_gradients(model)
            optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_head_whose_weight_the_loss_reads_is_to_be_trained_in_full() -> None:
    model = get_peft_model(Reads(), LoraConfig(r=2, target_modules=["called", "head"]))
    inner = model.get_base_model()
    (inner.called(inner.embed(IDS)) @ inner.head.weight.T).square().sum().backward()
    with pytest.raises(TrainingError, match=r"no gradient: head\. .*weight of the output head.* modules_to_save, not"):
        check_gradients(model)


class Shares(Reads):
    """``read`` only holds the weight that ``called`` computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.called.weight = self.read.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.called(self.embed(ids)))


def test_module_that_shares_its_weight_is_named_with_the_others() -> None:
    with pytest.raises(TrainingError, match=r"no gradient: read\. 'read' shares its weight with 'called', which the"):
        check_gradients(ran(["read", "head"], model=Shares()))
    check_gradients(ran(["read", "head"], model=Shares(), ensure_weight_tying=True))


def test_copies_and_rows_are_looked_at_too_and_rows_may_be_zero() -> None:
    check_gradients(ran(["called"], modules_to_save=["head"], trainable_token_indices={"embed": [1, 4]}))
    rows = ran(["called"], trainable_token_indices={"embed": [4]})  # which is not in the batch
    check_gradients(rows)
    rows.zero_grad()
    inner = rows.get_base_model()
    inner.called(nn.functional.embedding(IDS, inner.embed.original_module.weight)).square().sum().backward()
    with pytest.raises(TrainingError, match=r"1 of 2 adapted layers got no gradient: embed\."):
        check_gradients(rows)


def test_tensors_are_named_where_others_of_the_layer_have_a_gradient() -> None:
    model = ran(["called"], lora_bias=True)
    layer = model.get_base_model().called
    layer.lora_B["default"].bias.grad = None
    with pytest.raises(TrainingError, match=r"1 of 1 adapted layers got no gradient: called\.lora_B\.default\.bias\."):
        check_gradients(model)


def test_gradients_that_are_all_zero_are_none_unless_they_are_taken_for_some() -> None:
    model = ran(["called", "head"])
    for parameter in model.get_base_model().called.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    with pytest.raises(TrainingError, match=r"1 of 2 adapted layers got no gradient: called\."):
        check_gradients(model)
    check_gradients(model, zeros=True)


def test_adapters_that_are_not_active_may_be_without() -> None:
    model = get_peft_model(Reads(), LoraConfig(r=2, target_modules=["called"]))
    model.add_adapter("rests", LoraConfig(r=2, target_modules=["called", "head"]))
    model.base_model.set_requires_grad("rests", True)
    model(IDS).square().sum().backward()
    check_gradients(model)


def test_a_is_not_missed_where_it_is_frozen() -> None:
    check_gradients(ran(["called"], freeze_A=True))


def test_nothing_trained_at_all() -> None:
    model = get_peft_model(Reads(), LoraConfig(r=2, target_modules=["called"]))
    with pytest.raises(TrainingError, match=r"None of the 2 trainable weights got a gradient: nothing would be learnt"):
        check_gradients(model)
    with pytest.raises(AdapterError, match=r"must be a torch\.nn\.Module, found 'model'"):
        check_gradients("model")  # type: ignore[arg-type]


def test_wrapped_and_injected_models_are_seen_through() -> None:
    with pytest.raises(TrainingError, match=r"no gradient: read\."):
        check_gradients(nn.Sequential(ran(["called", "read"])))
    model = lorafa.inject_adapter_in_model(LoraConfig(r=2, target_modules=["called", "read"]), Reads())
    model(IDS).square().sum().backward()
    with pytest.raises(TrainingError, match=r"no gradient: read\."):
        check_gradients(model)
