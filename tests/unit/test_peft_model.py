"""PeftModel: adapters by name, switching, disabling, scaling, and what every call leaves alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafa
from adapter_toys import assert_unchanged, everything, train
from lorafa import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model


class Model(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BASE = Model().double()


def config(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(targets or ("first", "second")), **({"r": 2} | settings))


def three() -> PeftModel:
    """Adapters a (both layers, and the head in full), b (first) and c (second); a is active."""
    model = get_peft_model(Model().double(), config(modules_to_save=["head"]), "a")
    model.add_adapter("b", config("first", lora_alpha=5))
    model.add_adapter("c", config("second", r=3))
    for name in ("c", "b", "a"):
        model.set_adapter(name)
        train(model)
    return model.eval()


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names_of(model: nn.Module, adapter: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if f".{adapter}." in name}


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(X)


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


# ---- shape of the model


def test_the_model_answers_for_the_one_it_wraps() -> None:
    model = three()
    assert model.get_base_model() is model.base_model.model
    assert model.head is model.get_base_model().head
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_wrapped_modules_answer_for_the_ones_they_wrap() -> None:
    class Words(Model):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 6, padding_idx=0)

    model = get_peft_model(Words(), config(modules_to_save=["head"], trainable_token_indices={"table": [1]}))
    for twin in (model, copy.deepcopy(model)):
        assert twin.get_base_model().head.in_features == 5
        assert twin.get_base_model().table.padding_idx == 0
        assert twin.get_base_model().table.num_embeddings == 5
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'nonsense'"):
        _ = model.get_base_model().head.nonsense


def test_configs_handed_in_are_copied_and_never_changed() -> None:
    mine = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", r=2)
    before = copy.deepcopy(mine)
    model = get_peft_model(Model(), mine)
    assert mine == before
    assert model.peft_config["default"] is not mine
    assert model.peft_config["default"].target_modules == {"first", "second", "head"}


def test_a_copy_is_independent_and_computes_the_same() -> None:
    model = three()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), run(model))
        assert trains(twin) == trains(model)
        assert twin.active_adapters == model.active_adapters
        before = run(model)
        train(twin)
        assert not torch.equal(run(twin), before)
        assert torch.equal(run(model), before)
        twin.set_adapter("b")
        twin.merge_adapter()
        twin.unmerge_adapter()
        twin.delete_adapter("a")
        assert model.active_adapters == ["a"]
        assert torch.equal(run(model), before)


def test_a_merged_model_is_copied_with_what_unmerging_needs() -> None:
    model = three()
    model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), run(model))
        twin.unload()
        assert torch.equal(run(twin.get_base_model()), run(BASE))
    assert model.get_model_status().merged_adapters == ["a"]


def test_a_module_with_two_names_is_adapted_once_and_everywhere() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(6, 6)
            self.right = self.left

        def forward(self, x: Tensor) -> Tensor:
            return self.right(self.left(x).tanh())

    base = Shared().double()
    model = get_peft_model(base, LoraConfig(target_modules=["left"], r=2))
    train(model)
    assert base.left is base.right
    assert len(model.get_layer_status()) == 1
    adapted = run(model)
    merged = model.merge_and_unload()
    assert merged.left is merged.right
    assert type(merged.left) is nn.Linear
    torch.testing.assert_close(run(merged), adapted)


def test_injection_adds_no_wrapper_and_a_second_adapter_can_follow() -> None:
    base = Model().double()
    model = inject_adapter_in_model(config(), base, "a")
    assert model is base
    assert torch.equal(run(model), run(BASE))
    inject_adapter_in_model(config("first"), model, "b")
    assert list(model.peft_config) == ["a", "b"]
    assert trains(model) == names_of(model, "b")


def test_the_random_start_of_a_layer_does_not_depend_on_the_other_targets() -> None:
    alone = get_peft_model(Model(), config("second", init_seed=3)).get_base_model().second
    among = get_peft_model(Model(), config("first", "second", "head", init_seed=3)).get_base_model().second
    assert torch.equal(alone.lora_A["default"].weight, among.lora_A["default"].weight)


def test_making_an_adapter_does_not_move_torchs_random_numbers() -> None:
    state = torch.random.get_rng_state()
    get_peft_model(copy.deepcopy(BASE), config(init_lora_weights=False))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_print_trainable_parameters_counts_each_parameter_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(Model(), config("first", r=2))
    model.print_trainable_parameters()
    trained, total = 2 * 6 + 8 * 2, 6 * 8 + 8 + 8 * 5 + 5 + 5 * 3 + 3 + 28
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    )
    assert model.get_nb_trainable_parameters() == (trained, total)


@pytest.mark.parametrize("training", [True, False])
def test_the_wrapped_model_keeps_its_mode(training: bool) -> None:
    base = Model().train(training)
    base.first.eval()
    model = get_peft_model(base, config())
    assert model.training is model.base_model.training is base.training is training
    assert not base.first.training
    assert not base.first.base_layer.training


def test_an_adapted_model_can_be_exported() -> None:
    model = three()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), run(model))


def test_a_model_of_meta_tensors_can_be_filled_later() -> None:
    wanted = three()
    state = lorafa.get_peft_model_state_dict(wanted, adapter_name="b")
    model = get_peft_model(Model().double(), config("first", lora_alpha=5), low_cpu_mem_usage=True)
    assert model.get_base_model().first.lora_A["default"].weight.is_meta
    lorafa.set_peft_model_state_dict(model, state)
    wanted.set_adapter("b")
    assert torch.equal(run(model), run(wanted))
