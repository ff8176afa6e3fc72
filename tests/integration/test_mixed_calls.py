"""Calls that mix adapters beside others of the same model: before and after them, and at the same time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import BackendError
from toys.adapters import train
from toys.compare import close
from toys.language_models import llama

IDS = torch.tensor([[4, 7, 1, 9, 3], [2, 8, 8, 5, 1], [9, 1, 4, 4, 6], [3, 3, 2, 7, 5]])
NAMES = ["a", "b", "__base__", "a"]


def two(**settings: Any) -> PeftModel:
    model = get_peft_model(llama().double(), LoraConfig(r=4, target_modules="all-linear", **settings), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear", **settings))
    model.set_requires_grad(["a", "b"])
    train(model, 0.2)
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_call_after_a_mixed_one_runs_again_without_its_rows(reentrant: bool) -> None:
    model = two().train()
    model.base_model.set_adapter(["a", "b"])
    wanted = gradients(model, model(IDS, labels=IDS).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(IDS, labels=IDS, adapter_names=NAMES).loss.backward()
    found = gradients(model, model(IDS, labels=IDS).loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(found[name], gradient, 1e-9)


@pytest.mark.parametrize("names", [(None, NAMES), (NAMES, None)], ids=["plain first", "mixed first"])
def test_a_plain_and_a_mixed_call_before_one_backward_are_refused_where_layers_run_again(names: Any) -> None:
    model = two().train()
    wanted = gradients(model, sum(model(IDS, labels=IDS, adapter_names=n).loss for n in names))
    assert wanted  # nothing runs again
    model.gradient_checkpointing_enable()
    first = model(IDS, labels=IDS, adapter_names=names[0]).loss
    with pytest.raises(BackendError, match=r"Two calls with gradients before one backward pass.*checkpointing off"):
        model(IDS, labels=IDS, adapter_names=names[1])
    first.backward()
    model(IDS, labels=IDS, adapter_names=names[1]).loss.backward()
    plain = [model(IDS, labels=IDS).loss for _ in range(2)]  # these read nothing of their call
    sum(plain).backward()


def test_what_a_call_returns_can_be_saved(tmp_path: Any) -> None:
    logits = two()(IDS).logits
    assert logits.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(logits, tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


CALLS: dict[str, Callable[[PeftModel], Tensor]] = {
    "plain": lambda model: model(IDS).logits,
    "mixed": lambda model: model(IDS, adapter_names=NAMES).logits,
    "others": lambda model: model(IDS, adapter_names=NAMES[::-1]).logits,
    "other rows": lambda model: model(IDS[:3], adapter_names=NAMES[:3]).logits,
    "generated": lambda model: model.generate(
        input_ids=IDS[:2], adapter_names=NAMES[1:3], max_new_tokens=3, do_sample=False, pad_token_id=0
    ),
}


@pytest.mark.parametrize("inner", CALLS)
@pytest.mark.parametrize("outer", CALLS)
def test_each_thread_has_the_adapters_of_its_own_call(outer: str, inner: str) -> None:
    model = two().eval()
    with torch.no_grad():
        wanted = {name: CALLS[name](model) for name in (outer, inner)}
    midway, go_on = threading.Event(), threading.Event()
    first, found = threading.current_thread(), {}

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        if threading.current_thread() is not first:
            midway.set()
            assert go_on.wait(30)

    def run() -> None:
        with torch.no_grad():
            found[outer, "outer"] = CALLS[outer](model)

    handle = model.get_base_model().model.layers[0].register_forward_hook(stop)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert midway.wait(30)
        with torch.no_grad():
            found[inner, "inner"] = CALLS[inner](model)
    finally:
        go_on.set()
        thread.join()
        handle.remove()
    for name, place in ((outer, "outer"), (inner, "inner")):
        assert torch.equal(found[name, place], wanted[name])


def test_a_plain_call_inside_a_mixed_one_has_the_active_adapter() -> None:
    model = two().eval()
    found = []

    def look(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        found.append(model(IDS).logits)
        return torch.zeros(len(ids), dtype=torch.bool)

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        wanted = model(IDS).logits
        tokens = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
        again = model.generate(input_ids=IDS, adapter_names=NAMES, stopping_criteria=[look], **options)
    assert torch.equal(tokens, again)
    assert len(found) == 3
    assert all(torch.equal(logits, wanted) for logits in found)
