"""PeftModel as a module: what it answers for, copies, shared modules, modes, injection, random numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa import LoraConfig, get_peft_model, inject_adapter_in_model
from toys.adapters import train
from toys.several import BASE, Model, X, config, names_of, run, three, trains


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
