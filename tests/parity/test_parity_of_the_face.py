"""Several adapters, switching, merging, status reports and attributes: what other people's code reads and calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorafa
from toys.language_models import llama, logits
from toys.parity import CASES, quiet, trained

FIRST: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "r": 4,
    "lora_alpha": 6,
    "modules_to_save": ["lm_head"],
}
SECOND: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_rslora": True, "lora_alpha": 3}
THIRD: dict[str, Any] = {"target_modules": ["v_proj"], "r": 3, "trainable_token_indices": [1, 4]}


def base() -> nn.Module:
    torch.manual_seed(0)
    return llama().double().eval()


class Pair:
    """The same model under both libraries; everything done to one is done to the other."""

    def __init__(self, **first: Any) -> None:
        settings = first or FIRST
        with quiet():
            self.ours = lorafa.get_peft_model(base(), lorafa.LoraConfig(**settings))
            self.theirs = peft.get_peft_model(base(), peft.LoraConfig(**settings))
        self.align("default")

    def add(self, name: str, settings: dict[str, Any]) -> None:
        with quiet():
            self.ours.add_adapter(name, lorafa.LoraConfig(**settings))
            self.theirs.add_adapter(name, peft.LoraConfig(**settings))
        self.align(name)

    def align(self, name: str) -> None:
        """Give the adapter the same random values on both sides."""
        generator = torch.Generator().manual_seed(len(name))
        others = dict(self.theirs.named_parameters())
        with torch.no_grad():
            for key, parameter in self.ours.named_parameters():
                if f".{name}." in key or key.endswith(f".{name}"):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
                    others[key].copy_(parameter)

    def both(self, act: Callable[[Any], Any]) -> tuple[Any, Any]:
        with quiet():
            return act(self.ours), act(self.theirs)

    def check(self) -> None:
        """Names, flags, active adapters and outputs agree."""
        flags = self.both(lambda m: {name: p.requires_grad for name, p in m.named_parameters()})
        assert flags[0] == flags[1]
        active = self.both(lambda m: (m.active_adapters, list(m.peft_config)))
        assert active[0] == active[1]
        with torch.no_grad():
            outputs = self.both(lambda m: logits(m.eval()))
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
        assert self.both(lambda m: m.get_nb_trainable_parameters())[0] == self.theirs.get_nb_trainable_parameters()


def without_token_merges(statuses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Single embedding rows are not merged here until the adapter is unloaded; PEFT merges them too."""
    return [status | {"merged_adapters": []} if "Token" in status["module_type"] else status for status in statuses]


@pytest.fixture
def two() -> Pair:
    pair = Pair()
    pair.add("second", SECOND)
    return pair


@pytest.fixture
def pair(two: Pair) -> Pair:
    two.add("third", THIRD)
    return two


STEPS: dict[str, list[Callable[[Any], Any]]] = {
    "added adapters change nothing": [],
    "set_adapter": [lambda m: m.set_adapter("second"), lambda m: m.set_adapter("third")],
    "set_adapter there and back": [lambda m: m.set_adapter("second"), lambda m: m.set_adapter("default")],
    "set_adapter for inference": [lambda m: m.set_adapter("second", inference_mode=True)],
    "two at once": [lambda m: m.base_model.set_adapter(["default", "second"])],
    "three at once": [lambda m: m.base_model.set_adapter(["third", "default", "second"])],
    "set_requires_grad": [lambda m: m.set_requires_grad(["second", "third"])],
    "set_requires_grad off": [lambda m: m.set_requires_grad("default", False)],
    "delete an inactive one": [lambda m: m.delete_adapter("second")],
    "merge": [lambda m: m.merge_adapter()],
    "merge and unmerge": [lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()],
    "merge two": [lambda m: m.base_model.set_adapter(["default", "second"]), lambda m: m.merge_adapter()],
    "disable and enable layers": [lambda m: m.disable_adapter_layers(), lambda m: m.enable_adapter_layers()],
    "scale": [lambda m: each_layer(m, lambda layer: layer.set_scale("default", 2.5))],
    "scale the active": [lambda m: each_layer(m, lambda layer: layer.scale_layer(0.5))],
    "scale and unscale": [
        lambda m: each_layer(m, lambda layer: layer.scale_layer(0.5)),
        lambda m: each_layer(m, lambda layer: layer.unscale_layer(2)),
    ],
    "scale and reset": [
        lambda m: each_layer(m, lambda layer: layer.scale_layer(0.5)),
        lambda m: each_layer(m, lambda layer: layer.unscale_layer()),
    ],
}


def test_merging_by_name_is_as_in_peft(two: Pair) -> None:  # PEFT cannot if another adapter has token rows
    two.both(lambda m: m.merge_adapter(adapter_names=["second"]))
    two.check()
    statuses = two.both(lambda m: [asdict(status) for status in m.get_layer_status()])
    assert statuses[0] == statuses[1]


def each_layer(model: Any, act: Callable[[Any], None]) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            act(module)


@pytest.mark.parametrize("step", list(STEPS))
def test_after_every_call_flags_active_adapters_and_outputs_are_those_of_peft(pair: Pair, step: str) -> None:
    for act in STEPS[step]:
        pair.both(act)
    pair.check()


@pytest.mark.parametrize("step", [step for step in STEPS if "set_requires" not in step])
def test_after_every_call_the_status_reports_are_those_of_peft(pair: Pair, step: str) -> None:
    for act in STEPS[step]:
        pair.both(act)
    layers = pair.both(lambda m: [asdict(status) for status in m.get_layer_status()])
    assert without_token_merges(layers[0]) == without_token_merges(layers[1])
    whole = pair.both(lambda m: asdict(m.get_model_status()))
    assert asdict(lorafa.get_model_status(pair.ours)) == whole[0]
    if step in ("merge", "merge two"):  # PEFT calls it irregular, for the copy of lm_head cannot be merged
        assert whole[1].pop("merged_adapters") == "irregular"
        assert whole[0].pop("merged_adapters") == pair.ours.active_adapters
    assert whole[0] == whole[1]


def test_the_merged_adapters_of_a_model_are_reported_as_in_peft() -> None:
    pair = Pair(target_modules=["q_proj"])
    pair.add("second", {"target_modules": ["q_proj", "v_proj"]})
    pair.both(lambda m: m.merge_adapter())
    statuses = pair.both(lambda m: asdict(m.get_model_status()))
    assert statuses[0] == statuses[1]


def test_status_of_a_base_model_with_a_task_type_is_that_of_peft() -> None:
    pair = Pair(**FIRST, task_type="CAUSAL_LM")
    pair.both(lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.set_adapter([]))
    statuses = pair.both(lambda m: asdict(m.get_model_status()))
    assert statuses[0] == statuses[1]


def test_disable_adapter_gives_the_base_model_inside_and_the_adapters_after_it(pair: Pair) -> None:
    with torch.no_grad():
        plain = logits(base())
        for model in (pair.ours, pair.theirs):
            with quiet(), model.disable_adapter():
                torch.testing.assert_close(logits(model.eval()), plain, rtol=1e-9, atol=1e-9)
    pair.check()


def test_the_trainable_parameters_are_printed_as_peft_prints_them(pair: Pair, capsys: pytest.CaptureFixture) -> None:
    pair.ours.print_trainable_parameters()
    ours = capsys.readouterr().out
    pair.theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_a_merged_and_unloaded_model_has_the_weights_peft_gives_it(pair: Pair) -> None:
    merged = pair.both(lambda m: m.merge_and_unload().state_dict())
    assert merged[0].keys() == merged[1].keys()
    for key, value in merged[0].items():
        torch.testing.assert_close(value, merged[1][key], rtol=1e-9, atol=1e-9, msg=key)


def test_an_unloaded_model_is_the_base_model_bit_for_bit(pair: Pair) -> None:
    wanted, unloaded = base().state_dict(), pair.ours.unload().state_dict()
    assert unloaded.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in unloaded.items())


ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "r": lambda layer: layer.r,
    "lora_alpha": lambda layer: layer.lora_alpha,
    "scaling": lambda layer: layer.scaling,
    "use_rslora": lambda layer: layer.use_rslora,
    "use_dora": lambda layer: layer.use_dora,
    "lora_bias": lambda layer: layer.lora_bias,
    "merged": lambda layer: layer.merged,
    "merged_adapters": lambda layer: layer.merged_adapters,
    "active_adapters": lambda layer: layer.active_adapters,
    "disable_adapters": lambda layer: layer.disable_adapters,
    "in_features": lambda layer: layer.in_features,
    "out_features": lambda layer: layer.out_features,
    "names in lora_A": lambda layer: list(layer.lora_A),
    "names in lora_B": lambda layer: list(layer.lora_B),
    "names in lora_embedding_A": lambda layer: list(layer.lora_embedding_A),
    "names in lora_dropout": lambda layer: list(layer.lora_dropout),
    "names in lora_magnitude_vector": lambda layer: list(layer.lora_magnitude_vector),
    "kind of dropout": lambda layer: type(layer.lora_dropout["default"]).__name__,
    "adapter_layer_names": lambda layer: layer.adapter_layer_names[:4],
    "base layer": lambda layer: type(layer.get_base_layer()).__name__,
    "weight": lambda layer: layer.weight.tolist(),
    "bias": lambda layer: None if getattr(layer, "bias", None) is None else layer.bias.tolist(),
    "shape of the delta": lambda layer: layer.get_delta_weight("default").shape,
}
LAYERS = {
    "linear-plain": "first",
    "linear-dropout": "second",
    "linear-rslora": "first",
    "linear-dora": "first",
    "linear-lora_bias": "first",
    "embedding": "table",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "transposed": "first",
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_answer_as_those_of_peft(name: str) -> None:
    case = CASES[name]
    ours, theirs = case.lorafa(), trained(case.peft())
    lorafa.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    layers = [getattr(model.base_model.model, LAYERS[name]) for model in (ours, theirs)]
    for question, ask in ATTRIBUTES.items():
        assert ask(layers[0]) == ask(layers[1]), question
    if "dora" not in name:  # PEFT leaves DoRA's magnitude out of it
        deltas = [layer.get_delta_weight("default") for layer in layers]
        torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["parameter-2d", "parameter-3d"])
def test_deltas_of_parameters_are_those_of_peft(name: str) -> None:
    case = CASES[name]
    ours, theirs = case.lorafa(), trained(case.peft())
    lorafa.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    deltas = [model.base_model.model.experts.get_delta_weight("default") for model in (ours, theirs)]
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-9, atol=1e-9)


def test_attributes_of_the_models_answer_as_in_peft(pair: Pair) -> None:
    questions: dict[str, Callable[[Any], Any]] = {
        "targeted_module_names": lambda m: m.targeted_module_names,
        "prefix": lambda m: m.base_model.prefix,
        "names of configs": lambda m: list(m.base_model.peft_config),
        "base model": lambda m: type(m.get_base_model()).__name__,
        "is the inner model": lambda m: m.get_base_model() is m.base_model.model,
        "forwarded attribute": lambda m: m.config.hidden_size,
        "config of the active adapter": lambda m: m.active_peft_config.r,
        "modules_to_save": lambda m: m.modules_to_save,
        "dtype": lambda m: m.base_model_torch_dtype,
        "peft_type": lambda m: str(m.peft_config["default"].peft_type.value),
        "peft_type of the model": lambda m: str(m.peft_type.value),
        "prompt learning": lambda m: m.active_peft_config.is_prompt_learning,
        "has_active_enabled_adapter": lambda m: m.has_active_enabled_adapter,
    }
    for question, ask in questions.items():
        answers = pair.both(ask)
        assert answers[0] == answers[1], question


def test_injecting_into_a_model_leaves_the_same_names_and_state_as_peft() -> None:
    with quiet():
        ours = lorafa.inject_adapter_in_model(lorafa.LoraConfig(**FIRST), base(), "mine")
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**FIRST), base(), "mine")
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert flags[0] == flags[1]
    trained(theirs)
    state = peft.get_peft_model_state_dict(theirs, adapter_name="mine")
    assert lorafa.get_peft_model_state_dict(ours, adapter_name="mine").keys() == state.keys()
    result = lorafa.set_peft_model_state_dict(ours, state, adapter_name="mine")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    wanted = asdict(peft.get_model_status(theirs)) | {"peft_types": {"mine": "LORA"}}  # PEFT does not say
    assert asdict(lorafa.get_model_status(ours)) == wanted
    assert [asdict(s) for s in lorafa.get_layer_status(ours)] == [asdict(s) for s in peft.get_layer_status(theirs)]


def test_a_second_adapter_can_be_injected_as_in_peft() -> None:
    with quiet():
        ours = lorafa.inject_adapter_in_model(lorafa.LoraConfig(**FIRST), base(), "one")
        lorafa.inject_adapter_in_model(lorafa.LoraConfig(**SECOND), ours, "two")
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**FIRST), base(), "one")
        peft.inject_adapter_in_model(peft.LoraConfig(**SECOND), theirs, "two")
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.peft_config) == list(theirs.peft_config)


def test_several_adapters_of_peft_are_loaded_from_its_folders(two: Pair, tmp_path) -> None:
    pair = two  # PEFT cannot save adapters with and without token rows together
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.theirs.save_pretrained(tmp_path)
        loaded = lorafa.PeftModel.from_pretrained(base(), tmp_path)
        loaded.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        pair.theirs.set_adapter(name)
        loaded.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(logits(loaded), logits(pair.theirs.eval()), rtol=1e-6, atol=1e-6)


def test_peft_loads_our_several_adapters_from_our_folders(pair: Pair, tmp_path) -> None:
    pair.ours.save_pretrained(tmp_path)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
        for name in ("second", "third"):
            loaded.load_adapter(tmp_path / name, name)
    for name in ("default", "second", "third"):
        pair.ours.set_adapter(name)
        loaded.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(logits(loaded), logits(pair.ours.eval()), rtol=1e-6, atol=1e-6)


def test_parameters_keep_the_order_they_have_in_peft() -> None:
    """Optimizers resume by order."""
    for name in ("linear-plain", "linear-dora", "embedding", "conv2d", "llama-all_linear", "llama-modules_to_save"):
        ours, theirs = CASES[name].lorafa(), CASES[name].peft()
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()], name
