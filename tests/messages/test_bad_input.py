"""What bad settings get: an error of the right kind that says what to do, and the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorafa
from lorafa import PeftModel, get_peft_model
from lorafa.errors import AdapterError, ConfigError, NotAvailableError, TargetError
from toys.blocks import Model, config, refused, train_model

NO_LAYER = [
    (
        {"target_modules": ["q_prj"]},
        "target_modules: 'q_prj' matches nothing in the model. Did you mean 'q_proj'? The last names of its layers "
        "that can carry an adapter are: attention, conv, embed, head, out_proj, q_proj, v_proj.",
    ),
    (
        {"target_modules": ["q_proj", "k_proj", "o_proj"]},
        "target_modules: 'k_proj', 'o_proj' match nothing in the model.",
    ),
    ({"target_modules": "q_proj"}, "a single string is a regular expression for the whole name."),
    ({"target_modules": ["proj"]}, "target_modules: 'proj' matches nothing in the model."),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        "target_modules: 'q_proj' matches nothing in the model. It is in none of the layers that layers_to_transform=",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"}, "'q_proj' matches nothing"),
    ({"target_modules": []}, "both empty. Set target_modules='all-linear', or name layers"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ".*"},
        "exclude_modules='.*' takes away every layer that target_modules names. Narrow it.",
    ),
    (
        {"target_modules": None},
        "target_modules is not set, and there is no usual choice for models of type None. Set target_modules='all-line",
    ),
    ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: 'q_prj' matches nothing in the model. Did you mean 'q_proj'?"),
    ({"rank_pattern": {"head": 2}}, "rank_pattern: 'head' matches nothing in the model."),
    ({"alpha_pattern": {"v": 2}}, "alpha_pattern: 'v' matches nothing in the model."),
    (
        {"target_parameters": ["experts.upp"]},
        "target_parameters: 'experts.upp' matches nothing in the model. Did you mean 'up'? The last names of its "
        "parameters are: bias, in_proj_bias, in_proj_weight, up, weight.",
    ),
    (
        {"modules_to_save": ["haed"]},
        "modules_to_save: 'haed' matches no module. Did you mean 'head'? The last names of",
    ),
    ({"trainable_token_indices": {"embedd": [1]}}, "trainable_token_indices: 'embedd' matches no module. Did you mean"),
    (
        {"trainable_token_indices": [1]},
        "trainable_token_indices: the model does not say which module is its input embedding. Name it: trainable_token",
    ),
]
WRONG_LAYER = [
    (
        {"target_modules": ["norm"]},
        "'layers.0.norm' is a LayerNorm, which cannot carry an adapter. Supported are linear, embedding and "
        "convolution layers, nn.MultiheadAttention, and single parameters by target_parameters.",
    ),
    (
        {"target_modules": ["out_proj"]},
        "'layers.0.attention.out_proj' is never called: nn.MultiheadAttention reads its weight, so an adapter on it "
        "would do nothing. Target 'layers.0.attention' instead; its out_proj gets an adapter too.",
    ),
    ({"target_parameters": ["norm.weight"]}, "target_parameters: 'layers.0.norm.weight' has 1 dimensions (8,); an ad"),
    (
        {"target_parameters": ["q_proj.weight"]},
        "target_parameters: 'layers.0.q_proj.weight' belongs to a layer that target_modules adapts as a whole.",
    ),
    (
        {"modules_to_save": ["embed"], "trainable_token_indices": {"embed": [1]}},
        "trainable_token_indices: 'embed' is also trained by modules_to_save. Take it out of one.",
    ),
    (
        {"target_modules": ["embed"], "trainable_token_indices": {"embed": [1]}},
        "trainable_token_indices: 'embed' is also trained by an adapter. Take it out of one.",
    ),
    (
        {"trainable_token_indices": {"norm": [1]}},
        "trainable_token_indices: 'norm' is a LayerNorm, not a table of rows.",
    ),
]
CONTRADICTIONS = [
    ({"target_modules": ["conv"], "r": 3}, "layers.0.conv: rank 3 is not divisible by the convolution's groups=2."),
    (
        {"target_modules": ["embed"], "lora_bias": True},
        "lora_bias is not defined on embedding layers. Exclude it, or set lora_bias=False.",
    ),
    (
        {"target_modules": [], "target_parameters": ["experts.up"], "lora_dropout": 0.1},
        "layers.0.experts.up: lora_dropout=0.1 cannot act on a bare parameter, which has no input of its own. Set lora",
    ),
    (
        {"target_modules": [], "target_parameters": ["experts.up"], "use_dora": True},
        "layers.0.experts.up: dora is not defined on experts layers. Exclude it, or use plain LoRA.",
    ),
    (
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 9},
        "layers.0.q_proj: rank 9 is larger than min(out, in) = 8 of its weight (8, 8), so it has no 9 singular vectors",
    ),
    (
        {"trainable_token_indices": {"embed": [1, 10]}},
        "trainable_token_indices: 10 is outside the 10 rows of 'embed'. If these tokens are",
    ),
]
LATER = {
    "Megatron": {"megatron_config": {"a": 1}},
}


@pytest.mark.parametrize(("settings", "text"), NO_LAYER + WRONG_LAYER)
@pytest.mark.filterwarnings("ignore")
def test_a_target_that_is_not_there_or_cannot_be_adapted(settings: dict[str, Any], text: str) -> None:
    model = Model()
    with refused(model, TargetError, text):
        get_peft_model(model, config(**settings))


@pytest.mark.parametrize(("settings", "text"), CONTRADICTIONS)
def test_settings_that_do_not_go_with_a_layer(settings: dict[str, Any], text: str) -> None:
    model = Model()
    with refused(model, ConfigError, text):
        get_peft_model(model, config(**settings))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("r", 0, "r must be an integer >= 1, found 0 (int)."),
        ("r", "8", "r must be an integer >= 1, found '8' (str). Pass r=8 if that is meant."),
        ("lora_dropout", 1.5, "lora_dropout must be a probability in [0, 1), found 1.5."),
        ("init_lora_weights", "pisa", "init_lora_weights has no value 'pisa'. Did you mean 'pissa'?"),
        ("bias", "lora", "bias has no value 'lora'. Did you mean 'lora_only'?"),
    ],
)
def test_values_that_are_not_allowed_are_refused_when_made_and_when_set_later(
    field: str, value: object, text: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        config(**{field: value})
    model, changed = Model(), config()
    setattr(changed, field, value)
    with refused(model, ConfigError, text):
        get_peft_model(model, changed)


@pytest.mark.parametrize("feature", list(LATER))
@pytest.mark.filterwarnings("ignore")
def test_features_of_later_versions_are_named_and_never_ignored(feature: str) -> None:
    model = Model()
    field = next(iter(LATER[feature]))
    wanted = config(**LATER[feature])
    assert getattr(wanted, field)
    with refused(model, NotAvailableError, field) as _:
        get_peft_model(model, wanted)
    with pytest.raises(NotAvailableError, match="not available"):
        get_peft_model(model, wanted)


def test_a_start_from_the_weight_without_computing_one() -> None:
    model = Model()
    with refused(model, ConfigError, "init_lora_weights='pissa' computes its start from the weight, but low_cpu_mem"):
        get_peft_model(model, config(init_lora_weights="pissa"), low_cpu_mem_usage=True)


def test_an_exclusion_that_matches_nothing_is_said_and_harmless() -> None:
    with pytest.warns(UserWarning, match=re.escape("exclude_modules: 'k_prj' matches nothing in the model.")):
        get_peft_model(Model(), config(exclude_modules=["k_prj"]))


def test_dropout_that_cannot_act_is_said() -> None:
    with pytest.warns(UserWarning, match=re.escape("embed: lora_dropout does not act on embedding layers")):
        get_peft_model(Model(), config(target_modules=["embed"], lora_dropout=0.1))


# ---- names


@pytest.mark.parametrize("name", ["", "a.b", None, 3])
def test_names_that_cannot_be_part_of_a_parameter_name(name: Any) -> None:
    model = Model()
    with refused(model, AdapterError, f"An adapter name is a non-empty string without a dot, found {name!r}."):
        get_peft_model(model, config(), adapter_name=name)


@pytest.mark.parametrize("name", ["items", "training", "forward", "pop"])
def test_names_that_torch_needs_itself(name: str) -> None:
    model = Model()
    with refused(model, AdapterError, f"{name!r} cannot be an adapter name: torch's containers of modules have an"):
        get_peft_model(model, config(), adapter_name=name)


CALLS: list[tuple[Callable[[PeftModel], Any], str]] = [
    (
        lambda m: m.add_adapter("default", config()),
        "The model already has an adapter 'default'. Choose another name, or",
    ),
    (
        lambda m: m.set_adapter("defualt"),
        "The model has no adapter 'defualt'. Did you mean 'default'? It has: default.",
    ),
    (lambda m: m.set_adapter(["default"]), "PeftModel.set_adapter takes one name, found ['default']. To let several"),
    (lambda m: m.base_model.set_adapter(["default", "x"]), "The model has no adapter 'x'. It has: default."),
    (lambda m: m.delete_adapter("other"), "The model has no adapter 'other'. It has: default."),
    (lambda m: m.set_requires_grad("other"), "The model has no adapter 'other'. It has: default."),
    (lambda m: m.merge_adapter(["other"]), "The model has no adapter 'other'. It has: default."),
    (lambda m: m.merge_and_unload(adapter_names=["other"]), "The model has no adapter 'other'. It has: default."),
    (lambda m: lorafa.get_peft_model_state_dict(m, adapter_name="x"), "The model has no adapter 'x'. It has: default."),
    (lambda m: lorafa.set_peft_model_state_dict(m, {}, "x"), "The model has no adapter 'x'. It has: default."),
    (lambda m: get_peft_model(m, config()), "The model is a PeftModel already. Call its add_adapter() to put another"),
    (lambda m: PeftModel.from_pretrained(m, "x"), "The model is a PeftModel already. Call its load_adapter() to put"),
    (
        lambda m: get_peft_model(m.get_base_model(), config()),
        "The model already has an adapter 'default'. Choose another",
    ),
]


@pytest.mark.parametrize(("call", "text"), CALLS)
def test_calls_with_a_name_that_is_taken_or_unknown(call: Callable[[PeftModel], Any], text: str) -> None:
    model = train_model()
    with refused(model, AdapterError, text):
        call(model)
    assert model.active_adapters == list(model.peft_config) == ["default"]


def test_a_second_adapter_that_trains_biases() -> None:
    model = get_peft_model(Model(), config(bias="all"))
    text = "bias='lora_only': adapter 'default' trains base biases already, and there is only one set of them."
    with refused(model, ConfigError, text):
        model.add_adapter("b", config(bias="lora_only"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda m: get_peft_model(Model(), config(), mixed=True),
            "mixed=True: models with adapters of several methods are not available in lorafa, which has LoRA and its",
        ),
        (lambda m: lorafa.PeftMixedModel(Model(), config()), "PeftMixedModel: models with adapters of several methods"),
        (
            lambda m: lorafa.PeftMixedModel.from_pretrained(Model(), "x"),
            "Drop mixed=True and use PeftModel: several LoRA",
        ),
    ],
)
def test_calls_of_peft_that_are_not_there_say_so(call: Callable[[PeftModel], Any], text: str) -> None:
    model = train_model()
    with refused(model, NotAvailableError, text):
        call(model)


def test_a_model_without_adapters_has_no_state_of_one() -> None:
    with pytest.raises(AdapterError, match="This Model carries no adapter of lorafa"):
        lorafa.get_peft_model_state_dict(Model())


def test_a_model_is_unloaded_once() -> None:
    model = train_model()
    model.unload()
    with pytest.raises(AdapterError, match=r"taken off this model already\. Call get_peft_model on it"):
        model.merge_and_unload()


def test_weights_that_are_not_finite_are_not_merged() -> None:
    model = train_model()
    with torch.no_grad():
        model.get_parameter("base_model.model.layers.0.q_proj.lora_A.default.weight")[0, 0] = float("inf")
    with refused(
        model, AdapterError, "Merging 'default' gives inf or nan in a Linear once rounded to its dtype; nothing was"
    ):
        model.merge_adapter()


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", None])
def test_a_name_is_no_model(model: Any) -> None:
    settings = lorafa.LoraConfig(target_modules=["q_proj"], init_lora_weights="lora_one")
    text = r"The model must be a torch\.nn\.Module, found .*\. Load it first"
    for call in (get_peft_model, lambda *given: lorafa.collect_statistics(*given, [torch.zeros(1)])):
        with pytest.raises(AdapterError, match=text):
            call(model, settings)
