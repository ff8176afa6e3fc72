"""What is trained beside the factors: whole modules (modules_to_save) and single rows (trainable_token_indices)."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from lorafa.errors import TargetError
from toys.adapters import train
from toys.compare import assert_unchanged, close, everything
from toys.models import Tied

X = torch.tensor([[1, 3, 3], [9, 0, 7]])
ROWS = [3, 7]


def adapted(model: nn.Module | None = None, **settings: object) -> PeftModel:
    config = {"target_modules": ["proj"], "r": 2} | settings
    peft = get_peft_model(model or Tied(), LoraConfig(**config))  # type: ignore[arg-type]
    train(peft)
    return peft


def with_rows(model: PeftModel, name: str = "default") -> Tied:
    """The same model with the trained rows written into the table that embedding and head share."""
    twin = copy.deepcopy(model).unload()
    adapter = model.get_base_model().embed.token_adapter
    with torch.no_grad():
        twin.embed.weight[adapter.token_indices[name]] = adapter.trainable_tokens_delta[name]
    twin.proj = copy.deepcopy(model.get_base_model().proj)
    return twin


@pytest.mark.parametrize("bias", [False, True])
def test_trained_rows_stand_in_for_those_of_the_table_in_embedding_and_tied_head(bias: bool) -> None:
    model = adapted(Tied(bias=bias), trainable_token_indices=ROWS)
    twin = with_rows(model)
    assert twin.head.weight is twin.embed.weight
    close(model(X), twin(X))


def test_rows_start_as_the_table_has_them() -> None:
    base, x = Tied(), X
    expected = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["proj"], trainable_token_indices=ROWS))
    assert torch.equal(model.get_base_model().embed(x), base.embed.original_module(x))
    close(model(x), expected)
    assert model.get_base_model().embed.token_adapter.trainable_tokens_delta["default"].shape == (2, 6)


def test_only_the_chosen_rows_get_a_gradient_and_both_uses_count() -> None:
    model = adapted(trainable_token_indices=ROWS)
    twin = with_rows(model)
    model(X).square().sum().backward()
    twin.embed.weight.requires_grad_(True)
    twin(X).square().sum().backward()
    base = model.get_base_model().embed.original_module
    assert base.weight.grad is None
    rows = model.get_base_model().embed.token_adapter.trainable_tokens_delta["default"]
    close(rows.grad, twin.embed.weight.grad[ROWS])


def test_order_of_the_indices_is_the_order_of_the_rows() -> None:
    model = adapted(trainable_token_indices=[7, 3])
    rows = model.get_base_model().embed.token_adapter.trainable_tokens_delta["default"]
    close(model.get_base_model().embed(torch.tensor([3, 7])), rows[[1, 0]])


def test_rows_are_switched_off_switched_over_merged_and_taken_off() -> None:
    base = Tied()
    with torch.no_grad():
        original = base(X)
        model = adapted(base, trainable_token_indices=ROWS)
        first = model(X)
        model.add_adapter("b", LoraConfig(target_modules=["proj"], trainable_token_indices=[1]))
        model.set_adapter("b")
        train(model)
        close(model(X), with_rows(model, "b")(X))
        model.set_adapter("default")
        assert torch.equal(model(X), first)
        with model.disable_adapter():
            assert torch.equal(model(X), original)
        merged = copy.deepcopy(model).merge_and_unload()
        close(merged(X), first)
        assert type(merged.embed) is nn.Embedding
        assert merged.head.weight is merged.embed.weight
        assert torch.equal(model.unload()(X), original)


def test_named_adapters_are_folded_in_with_their_rows_whichever_is_active() -> None:
    model = adapted(trainable_token_indices=ROWS)
    model.add_adapter("second", LoraConfig(target_modules=["proj"], r=2, trainable_token_indices=[1, 3]))
    model.set_adapter("second")
    train(model)
    expected = model(X)
    model.set_adapter("default")
    close(model.merge_and_unload(adapter_names=["second"])(X), expected)


def test_rows_go_through_a_state_dict() -> None:
    torch.manual_seed(4)
    model = adapted(trainable_token_indices=ROWS)
    tensors = get_peft_model_state_dict(model)
    assert tensors["base_model.model.embed.token_adapter.trainable_tokens_delta"].shape == (2, 6)
    torch.manual_seed(4)
    other = get_peft_model(Tied(), LoraConfig(target_modules=["proj"], r=2, trainable_token_indices=ROWS))
    set_peft_model_state_dict(other, tensors)
    assert torch.equal(other(X), model(X))


def test_scale_inside_the_embedding_acts_on_the_rows_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    base = Tied()
    base.embed = Scaled(10, 6).double()
    base.head.weight = base.embed.weight
    model = adapted(base, trainable_token_indices=ROWS)
    close(model(X), with_rows(model)(X))


# ---- modules_to_save


def test_saved_module_is_a_trained_copy_and_the_original_stays() -> None:
    base = Tied(bias=True)
    base.head.weight = nn.Parameter(torch.randn(10, 6).double())
    with torch.no_grad():
        original, weight = base(X), base.head.weight.clone()
        model = adapted(base, modules_to_save=["head"])
        wrapper = base.head
        first = model(X)
        assert torch.equal(wrapper.original_module.weight, weight)
        assert not wrapper.original_module.weight.requires_grad
        assert wrapper.modules_to_save["default"].weight.requires_grad
        assert wrapper.weight is wrapper.modules_to_save["default"].weight
        with model.disable_adapter():
            assert torch.equal(model(X), original)
        model.add_adapter("b", LoraConfig(target_modules=["proj"], r=2, modules_to_save=["head"]))
        model.set_adapter("b")
        assert torch.equal(model(X), original), "the second copy starts from the original, not from the first"
        assert not wrapper.modules_to_save["default"].weight.requires_grad
        model.set_adapter("default")
        assert torch.equal(model(X), first)
        merged = copy.deepcopy(model).merge_and_unload()
        close(merged(X), first)
        assert type(merged.head) is nn.Linear
        plain = model.unload()
        assert torch.equal(plain(X), original)
        assert plain.head is wrapper.original_module


def test_saved_modules_that_are_tied_train_one_table() -> None:
    model = adapted(modules_to_save=["embed", "head"])
    inner = model.get_base_model()
    assert inner.embed.weight is inner.head.weight
    assert inner.embed.weight is not inner.embed.original_module.weight
    assert inner.embed.original_module.weight is inner.head.original_module.weight


def test_deleting_an_adapter_takes_its_copies_and_rows_away() -> None:
    model = adapted(trainable_token_indices=ROWS)
    before = set(model.state_dict())
    settings = {"target_modules": ["proj"], "trainable_token_indices": [1]}
    model.add_adapter("b", LoraConfig(**settings))
    model.delete_adapter("b")
    assert set(model.state_dict()) == before


# ---- two ways of training one weight


@pytest.mark.parametrize("first", [{"target_modules": ["embed"]}, {"modules_to_save": ["embed"]}], ids=str)
def test_rows_of_a_table_that_another_adapter_trains_are_refused(first: dict[str, object]) -> None:
    model = adapted(**first)
    before = everything(model)
    with pytest.raises(TargetError, match="'embed' is adapted or trained in full by another adapter already"):
        model.add_adapter("b", LoraConfig(target_modules=["proj"], trainable_token_indices=ROWS))
    assert_unchanged(before, model)


def test_rows_of_a_table_whose_tied_head_is_adapted_are_refused() -> None:
    text = "'head' shares the table of 'embed', .* Take it out of one of the two"
    with pytest.raises(TargetError, match=text):
        adapted(target_modules=["head"], trainable_token_indices=ROWS)
    for first in ({"target_modules": ["head"]}, {"modules_to_save": ["head"]}):
        model = adapted(**first)
        with pytest.raises(TargetError, match=text):
            model.add_adapter("b", LoraConfig(target_modules=["proj"], trainable_token_indices=ROWS))


def test_rows_are_trained_beside_a_head_that_is_saved_in_full() -> None:
    base = Tied()
    with torch.no_grad():
        original = base(X)
        model = adapted(base, modules_to_save=["head"], trainable_token_indices=ROWS)
        head = base.head.modules_to_save["default"]
        close(model(X), head(torch.tanh(base.proj(base.embed(X)))))
        expected = model(X)
        with model.disable_adapter():
            assert torch.equal(model(X), original)
        close(copy.deepcopy(model).merge_and_unload()(X), expected)
        assert torch.equal(model.unload()(X), original)


def test_module_that_holds_an_adapted_layer_cannot_be_saved_in_full() -> None:
    model = nn.Sequential(OrderedDict(block=nn.Sequential(nn.Linear(6, 6)), out=nn.Linear(6, 6)))
    peft = get_peft_model(model, LoraConfig(target_modules=["block.0"], r=2))
    with pytest.raises(TargetError, match="modules_to_save: 'block' carries an adapter already"):
        peft.add_adapter("b", LoraConfig(target_modules=["out"], modules_to_save=["block"], r=2))
