"""PeftModel: adapters by name, switching, disabling, scaling, and what every call leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lorafa import PeftModel, get_peft_model
from toys.adapters import train
from toys.compare import assert_unchanged, everything
from toys.several import BASE, Model, X, config, names_of, run, three, trains


def by_hand(model: PeftModel, *names: str) -> Tensor:
    """The output with the updates of ``names`` added to the base weights."""
    plain, inner = copy.deepcopy(BASE), model.get_base_model()
    with torch.no_grad():
        for key in ("first", "second"):
            layer = getattr(inner, key)
            for name in names:
                if name in layer.lora_A:
                    product = layer.lora_B[name].weight @ layer.lora_A[name].weight
                    getattr(plain, key).weight += layer.scaling[name] * product
        if "a" in names:
            plain.head.load_state_dict(inner.head.modules_to_save["a"].state_dict())
        return plain(X)


# ---- which adapter counts


def test_a_new_adapter_does_not_change_the_output() -> None:
    model = get_peft_model(Model().double(), config(), "a")
    assert torch.equal(run(model), run(BASE))


def test_adding_an_adapter_leaves_everything_else_as_it_was() -> None:
    model = three()
    before, output = everything(model), run(model)
    model.add_adapter("d", config())
    after = everything(model)
    for aspect in ("values", "trains", "objects"):
        for key, value in before[aspect].items():
            same = torch.equal(after[aspect][key], value) if isinstance(value, Tensor) else after[aspect][key] == value
            assert same, (aspect, key)
    assert names_of(model, "d")
    assert not trains(model) & names_of(model, "d")
    assert model.active_adapters == ["a"]
    assert torch.equal(run(model), output)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_set_adapter_makes_one_adapter_count_and_train(name: str) -> None:
    model = three()
    model.set_adapter(name)
    torch.testing.assert_close(run(model), by_hand(model, name))
    assert trains(model) == names_of(model, name)
    assert model.active_adapters == [name]
    assert model.active_adapter == name
    assert model.active_peft_config is model.peft_config[name]


def test_several_adapters_add_up() -> None:
    model = three()
    model.base_model.set_adapter(["b", "c"])
    torch.testing.assert_close(run(model), by_hand(model, "b", "c"))
    assert trains(model) == names_of(model, "b") | names_of(model, "c")
    assert model.active_adapter == ["b", "c"]


def test_set_adapter_for_inference_trains_nothing() -> None:
    model = three()
    model.set_adapter("b", inference_mode=True)
    assert not trains(model)
    torch.testing.assert_close(run(model), by_hand(model, "b"))


def test_set_requires_grad_does_not_change_what_counts() -> None:
    model = three()
    model.set_requires_grad(["b", "c"])
    assert trains(model) == names_of(model, "a") | names_of(model, "b") | names_of(model, "c")
    model.set_requires_grad("a", False)
    assert trains(model) == names_of(model, "b") | names_of(model, "c")
    torch.testing.assert_close(run(model), by_hand(model, "a"))


def test_no_adapter_may_be_active() -> None:
    model = three()
    model.base_model.set_adapter([])
    assert torch.equal(run(model), run(BASE))
    assert not trains(model)


def test_deleting_an_inactive_adapter_leaves_the_others_and_no_trace() -> None:
    model = three()
    before, output = everything(model), run(model)
    model.delete_adapter("b")
    assert not names_of(model, "b")
    assert list(model.peft_config) == ["a", "c"]
    assert torch.equal(run(model), output)
    kept = everything(model)["values"]
    assert all(torch.equal(before["values"][key], value) for key, value in kept.items())
    model.add_adapter("b", config("first"))
    assert not trains(model) & names_of(model, "b")


def test_deleting_the_active_adapter_makes_the_next_one_count() -> None:
    model = three()
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    torch.testing.assert_close(run(model), by_hand(model, "b"))
    assert trains(model) == names_of(model, "b")


def test_deleting_the_last_adapter_leaves_the_base_model_running() -> None:
    model = get_peft_model(Model().double(), config(), "a")
    train(model)
    model.delete_adapter("a")
    assert model.active_adapters == []
    assert torch.equal(run(model), run(BASE))


# ---- without adapters


def test_disable_adapter_gives_the_base_model_for_the_length_of_a_block() -> None:
    model = three()
    before, output = everything(model), run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(BASE))
    assert torch.equal(run(model), output)
    assert_unchanged(before, model)


def test_disable_adapter_nests() -> None:
    model = three()
    output = run(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(run(model), run(BASE))
        assert torch.equal(run(model), run(BASE))
    assert torch.equal(run(model), output)


def test_disable_adapter_ends_with_an_exception_too() -> None:
    model = three()
    before, output = everything(model), run(model)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(run(model), output)
    assert_unchanged(before, model)


def test_disable_adapter_works_while_merged_and_leaves_it_merged() -> None:
    model = three()
    model.merge_adapter()
    before, output = everything(model), run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(BASE))
    assert torch.equal(run(model), output)
    assert_unchanged(before, model)
    assert model.get_model_status().merged_adapters == ["a"]


def test_disable_adapter_leaves_layers_off_that_were_off_before() -> None:
    model = three()
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(run(model), run(BASE))
    model.enable_adapter_layers()
    torch.testing.assert_close(run(model), by_hand(model, "a"))


def test_adapters_may_be_switched_inside_disable_adapter() -> None:
    model = three()
    with model.disable_adapter():
        model.set_adapter("b")
        assert torch.equal(run(model), run(BASE))
    torch.testing.assert_close(run(model), by_hand(model, "b"))


def test_an_adapter_added_while_others_are_off_is_off_too() -> None:
    model = get_peft_model(Model().double(), config("first"), "a")
    train(model)
    model.disable_adapter_layers()
    model.add_adapter("b", config("second"))
    model.set_adapter("b")
    train(model)
    assert torch.equal(run(model), run(BASE))
    model.enable_adapter_layers()
    torch.testing.assert_close(run(model), by_hand(model, "b"))


def test_outputs_without_adapters_need_no_gradient() -> None:
    model = three()
    with model.disable_adapter():
        assert not model(X).requires_grad
    assert model(X).requires_grad


# ---- scale


@contextmanager
def scaled(model: PeftModel, factor: float) -> Iterator[None]:
    for _, layer in model.base_model.lora_layers():
        layer.scale_layer(factor)
    yield
    for _, layer in model.base_model.lora_layers():
        layer.unscale_layer(factor)


def test_scaling_multiplies_the_update_and_unscaling_takes_it_back() -> None:
    model = three()
    model.set_adapter("b")
    delta = model.get_base_model().first.get_delta_weight("b")
    with scaled(model, 3.0):
        torch.testing.assert_close(model.get_base_model().first.get_delta_weight("b"), 3 * delta)
        torch.testing.assert_close(run(model), by_hand(model, "b"))
    torch.testing.assert_close(model.get_base_model().first.get_delta_weight("b"), delta)


def test_set_scale_is_relative_to_alpha_over_r_and_unscale_resets() -> None:
    layer = three().get_base_model().first
    layer.set_scale("b", 4.0)
    assert layer.scaling == {"a": 8 / 2, "b": 4.0 * 5 / 2}
    layer.set_adapter("b")
    layer.unscale_layer()
    assert layer.scaling["b"] == 5 / 2
