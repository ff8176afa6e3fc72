"""Factors made for all layers together: the same numbers, in a few operations, whatever happens to them in between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa import LoraConfig, get_peft_model
from lorafa.numerics.casts import Casts
from toys.watch import Launches

COPIES = "aten._foreach_copy_.default"


class Stack(nn.Module):
    """Layers one after another; which of them run and how is said from outside."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False, dtype=dtype) for _ in range(4))
        self.skipped: set[int] = set()
        self.checkpointed: bool | None = None  # whether reentrant, where it is

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number in self.skipped:
                continue
            if self.checkpointed is None:
                x = layer(x).tanh()
            else:
                x = checkpoint(lambda v, run=layer: run(v).tanh(), x, use_reentrant=self.checkpointed)
        return x


def adapted(dtype: torch.dtype = torch.bfloat16, adapter_dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Stack(dtype), LoraConfig(r=2, target_modules=r".*layers\.\d", init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return model


def rows(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(17, 8).to(dtype).requires_grad_()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).float().square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Called past its door, where nothing is made together."""
    return gradients(model.base_model.model, x)  # type: ignore[union-attr, arg-type]


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    def key(name: str) -> str:
        return name.removeprefix("base_model.model.")

    a, b = {key(n): g for n, g in a.items()}, {key(n): g for n, g in b.items()}
    pairs = [(grad, b.get(n)) for n, grad in a.items()]
    return a.keys() == b.keys() and all(f is g if f is None or g is None else torch.equal(f, g) for f, g in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_bit_for_bit_those_of_layers_by_themselves(
    dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    model, x = adapted(dtype, adapter_dtype), rows(dtype)
    expected = one_by_one(model, x)
    for _ in range(3):
        assert same(gradients(model, x), expected)


def test_from_the_second_call_on_two_operations_make_all_factors_and_bring_all_gradients() -> None:
    model, x = adapted(), rows()
    with Launches() as first:
        gradients(model, x)
    with Launches() as second:
        gradients(model, x)
    assert first.operations[COPIES] == 0
    assert second.operations[COPIES] == 2
    casts = "aten._to_copy.default"
    assert first.operations[casts] - second.operations[casts] == 4 * 6  # A and B forward, backward, and their gradients


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_layers_that_run_again_in_backward_have_the_same_gradients(reentrant: bool, calls: int) -> None:
    """Also where a second call comes before the backward pass of the first one, whatever was known before either."""
    plain, x = adapted(), rows()
    expected = one_by_one(plain, x)
    again = adapted()
    again.base_model.model.checkpointed = reentrant  # type: ignore[union-attr]
    for _ in range(3):
        again.zero_grad()
        losses = [again(x).float().square().sum() for _ in range(calls)]
        for loss in losses:
            loss.backward()
        found = {n: None if p.grad is None else p.grad / calls for n, p in again.named_parameters() if p.requires_grad}
        assert same(found, expected)


def test_a_layer_that_does_not_run_has_no_gradient() -> None:
    model, x = adapted(), rows()
    gradients(model, x)
    model.base_model.model.skipped = {1}  # type: ignore[union-attr]
    found = gradients(model, x)
    assert {name for name, grad in found.items() if grad is None} == {n for n in found if ".layers.1." in n}
    assert same(found, one_by_one(model, x))


def test_a_frozen_factor_is_frozen() -> None:
    model, x = adapted(), rows()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    gradients(model, x)
    found = gradients(model, x)
    assert all("lora_B" in name for name in found)
    assert same(found, one_by_one(model, x))


def _in_place(values: nn.Parameter) -> None:
    with torch.no_grad():
        values.mul_(-2)


def _in_other_memory(values: nn.Parameter) -> None:
    values.data = values.data * -2


@pytest.mark.parametrize("change", [_in_place, _in_other_memory])
@pytest.mark.parametrize("when", ["between calls", "in the middle of one"])
def test_a_factor_that_changes_is_read_as_it_is(change: Callable[[nn.Parameter], None], when: str) -> None:
    model, x = adapted(), rows()
    gradients(model, x)
    layers = model.base_model.model.layers  # type: ignore[union-attr]
    values = layers[3].lora_B["default"].weight
    before = model(x)
    if when == "between calls":
        change(values)
        found = model(x)
    else:
        hook = layers[1].register_forward_hook(lambda *_: change(values))
        found = model(x)
        hook.remove()
    assert not torch.equal(found, before)
    assert torch.equal(found, model.base_model.model(x))  # type: ignore[operator, union-attr]


def test_hooks_of_parameters_are_called_with_their_gradients() -> None:
    model, x = adapted(), rows()
    gradients(model, x)
    seen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "layers.2" in name and parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: seen.__setitem__(name, grad.clone()))
    model.base_model.model.skipped = {3}  # type: ignore[union-attr]
    found = gradients(model, x)
    assert len(seen) == 2
    assert all(torch.equal(found[name], grad) for name, grad in seen.items())  # type: ignore[arg-type]


def test_nothing_is_held_when_the_backward_pass_is_over() -> None:
    model, x = adapted(), rows()
    gradients(model, x)
    loss = model(x).float().square().sum()
    groups = model.base_model.call._casts._made.values()  # type: ignore[union-attr]
    made = [weakref.ref(factor.made) for group in groups for factor in group.values()]
    del groups
    assert len(made) == 8
    loss.backward()
    del loss
    gc.collect()
    assert [reference() for reference in made] == [None] * 8


def test_alone_a_factor_is_left_to_who_multiplies_with_it() -> None:
    factor = nn.Parameter(torch.randn(2, 3))
    casts = Casts()
    assert casts.of(factor, torch.bfloat16) is factor
    assert Casts(casts.asked).of(factor, torch.bfloat16) is factor
    with torch.no_grad():
        assert casts.of(factor, torch.bfloat16) is factor


def test_a_block_of_two_adapters_makes_those_that_count() -> None:
    model, x = adapted(), rows()
    model.add_adapter("other", LoraConfig(r=3, target_modules=r".*layers\.\d", init_lora_weights=False))
    gradients(model, x)
    model.set_adapter("other")
    gradients(model, x)
    with Launches() as launches:
        gradients(model, x)
    assert launches.operations[COPIES] == 2
    made = model.base_model.call._casts.asked  # type: ignore[union-attr]
    assert {id(p) for n, p in model.named_parameters() if ".other." in n} == set(made)
