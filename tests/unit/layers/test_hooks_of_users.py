"""Hooks of the user on a model, its adapted layers and their bases run whatever state the adapters are in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import PeftModel, mutate_base
from lorafa.errors import BackendError
from toys.adapters import DEFINED, VARIANT, adapted, only_layer
from toys.compare import close
from toys.layers import KINDS, backend_for, input_for

LINEAR = "torch.nn.modules.linear.Linear"
TAKEN_OUT = [
    kind for kind in KINDS
    if backend_for(kind).host in ("linear", "conv", "embedding") and not backend_for(kind).quantized
]  # fmt: skip
"""Kinds of layers whose weight a start can be taken out of: beside codes it stays."""
State = Callable[[PeftModel], contextlib.AbstractContextManager[Any]]


def training(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.train()
    return contextlib.nullcontext()


def evaluating(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.eval()
    return contextlib.nullcontext()


def without_gradients(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.eval()
    return torch.no_grad()


def disabled(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    return model.disable_adapter()


def merged(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.merge_adapter()
    return contextlib.nullcontext()


def disabled_while_merged(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.merge_adapter()
    return model.disable_adapter()


def merged_and_unmerged(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.merge_adapter()
    model.unmerge_adapter()
    return contextlib.nullcontext()


def of_no_adapter(model: PeftModel) -> contextlib.AbstractContextManager[Any]:
    model.base_model.set_adapter([])
    return contextlib.nullcontext()


STATES: list[State] = [
    *(training, evaluating, without_gradients, disabled, merged, disabled_while_merged, merged_and_unmerged),
    of_no_adapter,
]
PLACES: dict[str, Callable[[PeftModel], nn.Module]] = {
    "PeftModel": lambda model: model,
    "LoraModel": lambda model: model.base_model,
    "the user's model": lambda model: model.get_base_model(),
    "LoraLayer": only_layer,
    "base layer": lambda model: only_layer(model).base_layer,
}


def merges(state: State) -> bool:
    """Whether it merges, which a hook on the layer that takes the weight forbids: it may change what it computes."""
    return state in (merged, disabled_while_merged, merged_and_unmerged)


def plus_one(module: nn.Module, args: Any, output: Any) -> Any:
    """Attention gives its weights too."""
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


@pytest.mark.matrix(4)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_runs_once_and_what_it_returns_counts(kind: str, state: State, place: str) -> None:
    model, x = adapted(kind, dtype=torch.float32), input_for(kind)
    with state(model):
        expected = model(x)
    model = _again(model)
    calls: list[str] = []
    module = PLACES[place](model)
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(plus_one)
    module.register_forward_hook(lambda *_: calls.append("after"))
    if merges(state) and place == "base layer" and backend_for(kind).host in ("linear", "conv", "embedding"):
        with pytest.raises(BackendError, match=r"Nothing can be merged into this .*hook"):
            state(model)
        return
    with state(model):
        y = model(x)
    assert calls == ["before", "after"]
    close(y, expected + 1, torch.float32)


def _again(model: PeftModel) -> PeftModel:
    """The model in the state it was made in."""
    model.unmerge_adapter()
    model.set_adapter("default")
    return model.train()


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), [case for case in DEFINED if case[0] != "lora"], ids=str)
def test_hooks_on_the_base_of_every_variant_run(variant: str, kind: str) -> None:
    model, x, calls = adapted(kind, **VARIANT[variant]), input_for(kind), []
    only_layer(model).base_layer.register_forward_hook(lambda *_: calls.append(True))
    states = [state for state in STATES if not merges(state)]
    for state in states:
        with state(_again(model)):
            model(x)
    assert len(calls) == len(states)


@pytest.mark.parametrize("kind", TAKEN_OUT)
def test_the_start_is_not_taken_out_of_a_base_with_hooks_and_they_run(kind: str) -> None:
    model, x, calls = adapted(kind, init_lora_weights="pissa"), input_for(kind), []
    only_layer(model).base_layer.register_forward_hook(lambda *_: calls.append(True))
    with pytest.raises(BackendError, match="hook"):
        mutate_base(model)
    model(x)
    with model.disable_adapter():
        model(x)
    assert len(calls) == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("state", [training, merged, disabled, disabled_while_merged], ids=lambda s: s.__name__)
def test_backward_hooks_see_the_gradient(place: str, state: State) -> None:
    model, seen = adapted(LINEAR), []
    x = torch.randn(5, 7, 8, requires_grad=True)
    PLACES[place](model).register_full_backward_hook(lambda module, gi, go: seen.append((gi[0].shape, go[0].shape)))
    with state(model):
        model(x).sum().backward()
    assert seen == [((5, 7, 8), (5, 7, 24))]


def test_a_hook_put_on_a_merged_base_stays_when_it_is_unmerged() -> None:
    model, x, calls = adapted(LINEAR), input_for(LINEAR), []
    model.merge_adapter()
    only_layer(model).base_layer.register_forward_hook(lambda *_: calls.append(True))
    model.unmerge_adapter()
    model(x)
    assert len(calls) == 1
    with pytest.raises(BackendError, match=r"Nothing can be merged into this .*hook"):
        model.merge_and_unload()
