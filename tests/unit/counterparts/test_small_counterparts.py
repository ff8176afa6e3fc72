"""Functions that libraries take from PEFT's submodules: the same answers as PEFT's, on the same models."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import peft
import pytest
import torch
from peft.functional import delete_adapter as their_delete
from peft.functional import set_adapter as their_set
from peft.tuners.tuners_utils import check_target_module_exists as their_check
from peft.utils import merge_utils as their_merging
from peft.utils import other as theirs
from torch import nn

import lorafa
from lorafa.counterparts import functional, helpers, matching, sharding, utilities
from lorafa.counterparts.layers import BaseTunerLayer, Conv1d, Conv2d, Linear4bit
from lorafa.errors import AdapterError, ConfigError, NotAvailableError
from lorafa.numerics import task_arithmetic as ours_merging
from toys.language_models import IDS, llama
from toys.models import Convolution, Mlp
from toys.parity import quiet


def injected(lib: Any, inject: Any, names: tuple[str, ...] = ("a", "b")) -> nn.Module:
    """A model with adapters injected, not wrapped, in float64; the last one counts."""
    torch.manual_seed(0)
    model = Mlp().double()
    for name in names:
        torch.manual_seed(1)
        inject(lib.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False), model, name)
    return model


def state(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def active(model: nn.Module) -> list[list[str]]:
    return [list(module.active_adapters) for name, module in model.named_modules() if name in ("first", "second")]


def test_setting_and_deleting_adapters_leaves_what_peft_leaves() -> None:
    one = injected(lorafa, functional.inject_adapter_in_model)
    other = injected(peft, peft.inject_adapter_in_model)
    for names, inference in (("b", False), (["a", "b"], False), ("a", True)):
        functional.set_adapter(one, names, inference)
        their_set(other, names, inference)
        assert active(one) == active(other)
        assert {n: g for n, g in state(one).items() if "lora_" in n} == {
            n: g for n, g in state(other).items() if "lora_" in n
        }
    found = functional.delete_adapter(one, "a", prefix="lora_")
    with quiet():
        assert found == their_delete(other, "a", prefix="lora_") == ["b"]
    assert state(one).keys() == state(other).keys()
    assert functional.delete_adapter(one, "b") == []
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        functional.set_adapter(one, "c")


def test_half_precision_factors_become_float32_and_stay_the_objects_they_are() -> None:
    model = injected(lorafa, functional.inject_adapter_in_model).to(torch.bfloat16)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    functional.cast_adapter_dtype(model, "a", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    functional.cast_adapter_dtype(model, "a")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".a." in name else torch.bfloat16), name
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        functional.cast_adapter_dtype(model, "c")


def test_layers_answer_isinstance_by_pefts_classes() -> None:
    model = lorafa.get_peft_model(Convolution(2), lorafa.LoraConfig(r=2, target_modules=["conv"]))
    layer = next(layer for _, layer in model.base_model.lora_layers())
    assert isinstance(layer, Conv2d)
    assert isinstance(layer, BaseTunerLayer)
    assert not isinstance(layer, Conv1d)
    assert not isinstance(layer, Linear4bit)
    assert not isinstance(nn.Conv2d(1, 1, 1), Conv2d)
    with pytest.raises(NotAvailableError, match="Conv2d is for isinstance"):
        Conv2d(nn.Conv2d(1, 1, 1))


NAMES = ("model.layers.0.q_proj", "model.layers.11.mlp.q_proj", "lm_head", "other.q_projs", "model.layers.1.k")
CONFIGS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj"]},
    {"target_modules": r".*\.(q_proj|k)"},
    {"target_modules": ["q_proj", "k"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
)


@pytest.mark.parametrize("settings", CONFIGS, ids=["list", "expression", "indices", "excluded", "saved"])
def test_names_match_as_in_peft(settings: dict[str, Any]) -> None:
    for name in NAMES:
        found = matching.check_target_module_exists(lorafa.LoraConfig(**settings), name)
        assert bool(found) == bool(their_check(peft.LoraConfig(**settings), name)), name
    keys = ["q_proj", "layers.1.*", "^lm_head"]
    for name in NAMES:
        assert matching.get_pattern_key(keys, name) == theirs.get_pattern_key(keys, name)
        one, other = (lib.match_target_against_key(r".*(q_proj|k)", name) for lib in (matching, theirs))
        assert (one and one.group(1)) == (other and other.group(1))


def test_targets_that_a_model_settles_are_no_question_of_names() -> None:
    with pytest.raises(ConfigError, match="settled by a model"):
        matching.check_target_module_exists(lorafa.LoraConfig(target_modules="all-linear"), "lm_head")
    model = lorafa.get_peft_model(Mlp(), lorafa.LoraConfig(r=2, target_modules="all-linear"))
    assert matching.inspect_matched_modules(model.base_model)["matched"] == ["first", "second"]


def test_small_functions_answer_as_pefts() -> None:
    model = llama()
    for key in ("model.layers.0.self_attn.q_proj", "lm_head"):
        assert utilities._get_submodules(model, key) == theirs._get_submodules(model, key)
    assert utilities._get_input_embeddings_name(model) == theirs._get_input_embeddings_name(model)
    assert utilities._get_input_embeddings_name(nn.Linear(1, 1), "x") == "x"
    assert utilities._get_batch_size(IDS, None) == theirs._get_batch_size(IDS, None)
    with pytest.raises(ConfigError, match="no batch"):
        utilities._get_batch_size(None, None)
    weight = nn.Parameter(torch.randn(2, 3))
    for flag in (True, False):
        assert torch.equal(utilities.transpose(weight, flag), theirs.transpose(weight, flag))
        assert isinstance(utilities.transpose(weight, flag), nn.Parameter)
    assert utilities.id_tensor_storage(weight) == theirs.id_tensor_storage(weight)
    assert utilities.infer_device() == theirs.infer_device()
    for word in ("Yes", "off", "1", "F"):
        assert utilities.str_to_bool(word) == theirs.str_to_bool(word)
    with pytest.raises(ConfigError, match="'perhaps' is neither true nor false"):
        utilities.str_to_bool("perhaps")
    with utilities.init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta
    with utilities.gather_params_ctx(weight), utilities.onload_layer(nn.Linear(2, 2)):
        assert utilities.dequantize_module_weight(layer := nn.Linear(2, 2)) is layer.weight


def test_tensors_are_merged_as_by_peft() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for name, settings in (("task_arithmetic", {}), ("magnitude_prune", {"density": 0.4}), ("ties", {"density": 0.6})):
        one, other = (getattr(lib, name)(tensors, weights, **settings) for lib in (ours_merging, their_merging))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    stack = torch.stack(tensors)
    mask = their_merging.calculate_majority_sign_mask(stack, "frequency")
    assert torch.equal(ours_merging.calculate_majority_sign_mask(stack, "frequency"), mask)
    torch.testing.assert_close(
        ours_merging.disjoint_merge(stack, mask), their_merging.disjoint_merge(stack, mask), rtol=1e-12, atol=0
    )


def test_fsdp_wraps_the_same_modules() -> None:
    with quiet():
        one = lorafa.get_peft_model(llama(), lorafa.LoraConfig(r=2, target_modules=["q_proj"]))
        other = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped = []
    for model, policy in ((one, sharding.fsdp_auto_wrap_policy), (other, theirs.fsdp_auto_wrap_policy)):
        chosen = policy(model)
        wrapped.append(
            [n for n, m in model.named_modules() if chosen(module=m, recurse=False, nonwrapped_numel=0)]
        )
    assert wrapped[0] == wrapped[1]
    assert wrapped[0]


def test_fsdp_refuses_a_class_the_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sharding.CLASSES, "NoSuchBlock")
    with pytest.raises(ConfigError, match="no module of class NoSuchBlock"):
        sharding.fsdp_auto_wrap_policy(Mlp())


def test_signatures_become_those_of_the_wrapped_model() -> None:
    model = lorafa.get_peft_model(llama(), lorafa.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    y = model(IDS).logits
    helpers.update_signature(model)
    for name in ("forward", "generate"):
        wanted = inspect.signature(getattr(model.get_base_model(), name)).parameters
        assert list(inspect.signature(getattr(model, name)).parameters) == list(wanted)
    assert torch.equal(model(IDS).logits, y)
    with pytest.raises(ConfigError, match="method must be one of"):
        helpers.update_signature(model, "backward")


def test_contexts_that_change_nothing_leave_outputs() -> None:
    model = lorafa.get_peft_model(
        llama(), lorafa.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    ).eval()
    y = model(IDS).logits
    with helpers.DoraCaching(), helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(IDS).logits, y)
    helpers.DoraCaching()(enabled=False)


def test_a_trainer_with_the_mixin_adds_what_the_method_adds() -> None:
    class Trainer:
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False) -> Any:
            outputs = model(**inputs)
            return (outputs.logits.mean(), outputs) if return_outputs else outputs.logits.mean()

    class Mixed(helpers.MontecloraTrainerMixin, Trainer):
        pass

    base = llama()
    model = lorafa.get_peft_model(
        base, lorafa.LoraConfig(r=2, target_modules=["q_proj"], monteclora_config={"num_samples": 2})
    ).eval()
    plain = model(IDS).logits.mean()
    added = model.base_model._get_monteclora_loss()
    assert float(added) > 0
    assert model.base_model._get_kasa_loss() == 0.0
    loss, outputs = Mixed().compute_loss(model, {"input_ids": IDS}, return_outputs=True)
    torch.testing.assert_close(loss, plain + added)
    torch.testing.assert_close(Mixed().compute_loss(model, {"input_ids": IDS}), plain + added)
    assert outputs.logits.shape == model(IDS).logits.shape


@pytest.mark.parametrize("start", [True, "olora"])
def test_subtracted_starts_are_factors_of_the_difference(start: bool | str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["first"]}
    config = lorafa.LoraConfig(init_lora_weights=start, **settings)
    model = lorafa.get_peft_model(Mlp().double(), config, "first")
    model.add_adapter("trained", lorafa.LoraConfig(init_lora_weights=False, **settings))
    layer: Any = model.base_model.model.first
    trained = lorafa.get_peft_model_state_dict(model, adapter_name="trained")
    made = model.base_model.subtract_mutated_init(trained, "first")
    a, b = (made[f"base_model.model.first.lora_{factor}.weight"] for factor in "AB")
    expected = layer.get_delta_weight("trained") - layer.get_delta_weight("first")
    torch.testing.assert_close(layer.scaling["trained"] * b @ a, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(AdapterError, match="is not on it"):
        model.base_model.subtract_mutated_init({"base_model.model.second.lora_A.weight": torch.zeros(2, 2)}, "first")


def test_settings_of_a_model_are_a_mapping() -> None:
    base = llama()
    assert lorafa.LoraModel.get_model_config(base) == peft.LoraModel.get_model_config(base)
    assert lorafa.LoraModel.get_model_config(Mlp()) == {"model_type": "custom"}
    config = lorafa.LoraConfig.from_peft_type(peft_type="LORA", r=3, target_modules=["q"])
    assert (config.r, config.check_kwargs(r=3)) == (3, {"r": 3})


def test_token_rows_are_switched_where_libraries_switch_them() -> None:
    """What transformers' own set_adapter, disable_adapters and enable_adapters tell, they tell PEFT's layer inside."""
    torch.manual_seed(0)
    model = llama().eval()
    for name in ("a", "b"):
        config = lorafa.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
        functional.inject_adapter_in_model(config, model, name)
    rows = model.get_input_embeddings()
    with torch.no_grad():
        rows.token_adapter.trainable_tokens_delta["b"].add_(1)
    twin = copy.deepcopy(model)
    inner = [m for m in twin.modules() if isinstance(m, BaseTunerLayer)]
    own = twin.get_input_embeddings()
    assert own.token_adapter in inner
    assert own not in inner
    for module in inner:
        module.set_adapter("b")
    assert own.active_adapters == ["b"]
    assert torch.equal(own.weight[1], rows.token_adapter.trainable_tokens_delta["b"][0])
    for module in inner:
        module.enable_adapters(False)
    assert torch.equal(own.weight, own.original_module.weight)
    for module in inner:
        module.enable_adapters(True)
        module.set_adapter("a")
    assert torch.equal(own.weight, own.original_module.weight)
    assert own.token_adapter.active_adapters == own.token_adapter.active_adapter == ["a"]
    key = "token_adapter.trainable_tokens_delta"
    assert own.adapter_state_dict_load_map("a") == {key: f"{key}.a"}
    assert set(own.adapter_state_dict_load_map("a").values()) <= own.state_dict().keys()
    assert not own.token_adapter.merged
    assert not own.token_adapter.disable_adapters
    own.token_adapter.delete_adapter("b")
    assert list(own.held()) == ["a"]
