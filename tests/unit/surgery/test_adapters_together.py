"""Several adapters chosen together: what two of them want in one place is refused, nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError
from toys.adapters import train
from toys.compare import assert_unchanged, close, everything


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6).double()
        self.body = nn.Linear(6, 6).double()
        self.head = nn.Linear(6, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(self.embed(x))))
        return y


X = torch.tensor([[1, 3, 3], [9, 0, 7]])


def with_two(one: dict[str, Any], other: dict[str, Any], *, moved: bool = True) -> PeftModel:
    """Adapters "a" (active) and "b"."""
    common: dict[str, Any] = {"target_modules": ["body"], "r": 2, "init_lora_weights": False}
    model = get_peft_model(Net(), LoraConfig(**common, **one), adapter_name="a")
    model.add_adapter("b", LoraConfig(**common, **other))
    for name in ("b", "a") if moved else ("a",):
        model.set_adapter(name)
        if moved:
            train(model)
    return model


COPIES = ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]})
ROWS = ({"trainable_token_indices": {"embed": [3, 7]}}, {"trainable_token_indices": {"embed": [1, 7]}})
SAID = {
    "copies": r"Adapters '{0}' and '{1}' cannot count together: both have a copy \(modules_to_save\) of 'head', and ",
    "rows": r"Adapters '{0}' and '{1}' cannot .* both have values for rows 7 \(trainable_token_indices\) of 'embed', ",
}
TOGETHER: dict[str, Callable[[PeftModel], Any]] = {
    "set": lambda m: m.base_model.set_adapter(["a", "b"]),
    "set for inference": lambda m: m.base_model.set_adapter(["a", "b"], inference_mode=True),
    "merge": lambda m: m.merge_adapter(["a", "b"]),
    "merge and unload": lambda m: m.merge_and_unload(adapter_names=["a", "b"]),
}


@pytest.mark.parametrize("call", TOGETHER.values(), ids=TOGETHER)
@pytest.mark.parametrize(("settings", "said"), [(COPIES, SAID["copies"]), (ROWS, SAID["rows"])], ids=SAID)
def test_two_adapters_that_want_one_place_are_refused_together(
    settings: tuple[dict[str, Any], dict[str, Any]], said: str, call: Callable[[PeftModel], Any]
) -> None:
    model = with_two(*settings)
    before, y = everything(model), model(X)
    with pytest.raises(AdapterError, match=said.format("a", "b")):
        call(model)
    assert_unchanged(before, model)
    assert model.active_adapters == ["a"]
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("settings", [COPIES, ROWS], ids=SAID)
def test_one_that_was_merged_before_is_among_them(settings: tuple[dict[str, Any], dict[str, Any]]) -> None:
    model = with_two(*settings)
    model.merge_adapter(["b"])
    before, y = everything(model), model(X)
    for call in (lambda: model.merge_adapter(["a"]), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"Adapters 'b' and 'a' cannot count together: both have "):
            call()
    assert_unchanged(before, model)
    assert torch.equal(model(X), y)


def test_what_was_merged_is_unloaded_with_its_copies() -> None:
    model = with_two({}, {"modules_to_save": ["head"]})
    copied = model.get_base_model().head.modules_to_save["b"]
    model.merge_adapter(["b"])
    assert model.merge_and_unload().head is copied


@pytest.mark.parametrize("settings", [COPIES, ROWS], ids=SAID)
def test_each_alone_is_merged_as_before(settings: tuple[dict[str, Any], dict[str, Any]]) -> None:
    model = with_two(*settings)
    model.set_adapter("b")
    expected = model(X)
    model.set_adapter("a")
    close(model.merge_and_unload(adapter_names=["b"])(X), expected)


@pytest.mark.parametrize("settings", [({}, {}), COPIES, ROWS], ids=["factors", *SAID])
def test_an_adapter_named_twice_counts_once(settings: tuple[dict[str, Any], dict[str, Any]]) -> None:
    model = with_two(*settings)
    expected = model(X)
    model.base_model.set_adapter(["a", "a"])
    assert model.active_adapters == ["a"]
    close(model(X), expected)
    close(model.merge_and_unload(adapter_names=["a", "a"])(X), expected)


def test_a_wrapper_asked_by_itself_refuses_too() -> None:
    head = with_two(*COPIES).get_base_model().head
    with pytest.raises(AdapterError, match=r"both have a copy .* of this Linear, and only one can be there"):
        head.set_adapter(["a", "b"])
    assert head.active_adapters == ["a"]


def test_disjoint_rows_count_together_and_are_merged_together() -> None:
    model = with_two({"trainable_token_indices": {"embed": [3]}}, {"trainable_token_indices": {"embed": [1, 7]}})
    model.base_model.set_adapter(["a", "b"])
    embed = model.get_base_model().embed
    rows, table = embed.token_adapter.trainable_tokens_delta, embed.original_module.weight.clone()
    table[[3, 1, 7]] = torch.cat([rows["a"], rows["b"]])
    assert torch.equal(embed.weight, table)
    expected = model(X)
    close(model.merge_and_unload()(X), expected)


def test_one_copy_beside_an_adapter_without_counts() -> None:
    model = with_two({}, {"modules_to_save": ["head"]})
    model.base_model.set_adapter(["a", "b"])
    expected = model(X)
    close(model.merge_and_unload(adapter_names=["a", "b"])(X), expected)


def test_equal_rows_go_together_for_inference_and_not_in_training() -> None:
    """As new adapters they are equal; trained together, one of the two would learn nothing."""
    model = with_two(*ROWS, moved=False)
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    y = model(X)
    with pytest.raises(AdapterError, match="both have values for rows 7"):
        model.base_model.set_adapter(["a", "b"])
    close(model.merge_and_unload()(X), y)
