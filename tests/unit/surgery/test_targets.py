"""Which layers a config means: ends of names, expressions, indices, "all-linear", usual layers, patterns of ranks."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import TargetError
from lorafa.surgery.resolve import resolve


def block() -> nn.Module:
    return nn.ModuleDict(
        {
            "attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(4, 8), "out_proj": nn.Linear(8, 4)}),
        }
    )


def model(depth: int = 3) -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 4),
            "layers": nn.ModuleList(block() for _ in range(depth)),
            "norm": nn.LayerNorm(4),
            "lm_head": nn.Linear(4, 9),
        }
    )


def names(root: nn.Module, **settings: Any) -> list[str]:
    return [target.name for target in resolve(root, LoraConfig(**settings)).targets]


Q = [f"layers.{i}.attn.q_proj" for i in range(3)]
UP = [f"layers.{i}.mlp.up" for i in range(3)]
MLP_OUT = [f"layers.{i}.mlp.out_proj" for i in range(3)]
ATTN_OUT = [f"layers.{i}.attn.out_proj" for i in range(3)]

MEANS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a last name": ({"target_modules": ["q_proj"]}, Q),
    "a dotted end": ({"target_modules": ["mlp.out_proj"]}, MLP_OUT),
    "a whole name": ({"target_modules": ["layers.1.mlp.up"]}, UP[1:2]),
    "a part of a name is no end": ({"target_modules": ["q_proj", "embed"]}, ["embed", *Q]),
    "an expression for the whole name": ({"target_modules": r"layers\.[02]\..*up"}, [UP[0], UP[2]]),
    "an exclusion by end": ({"target_modules": ["out_proj"], "exclude_modules": ["attn.out_proj"]}, MLP_OUT),
    "an exclusion by expression": ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, [Q[0], Q[2]]),
    "an exclusion of a whole target": ({"target_modules": ["up", "q_proj"], "exclude_modules": ["up"]}, Q),
    "one index": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, Q[1:2]),
    "indices": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, [Q[0], Q[2]]),
    "indices of a named list": (
        {"target_modules": ["up"], "layers_to_transform": [2], "layers_pattern": "layers"},
        UP[2:],
    ),
    "indices of one of several lists": (
        {"target_modules": ["up"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
        UP[2:],
    ),
    "a whole name beside indices": (
        {"target_modules": ["layers.0.mlp.up", "q_proj"], "layers_to_transform": [1]},
        [UP[0], Q[1]],
    ),
    "no layer inside a saved module": ({"target_modules": ["q_proj"], "modules_to_save": ["layers.0"]}, Q[1:]),
    "all linear layers": (
        {"target_modules": "all-linear"},
        [name for i in range(3) for name in (Q[i], ATTN_OUT[i], UP[i], MLP_OUT[i])] + ["lm_head"],
    ),
    "all linear layers but": (
        {"target_modules": "ALL-linear", "exclude_modules": ["out_proj", "lm_head"]},
        [name for i in range(3) for name in (Q[i], UP[i])],
    ),
}


@pytest.mark.parametrize("case", list(MEANS))
def test_what_a_config_means(case: str) -> None:
    settings, expected = MEANS[case]
    assert names(model(), **settings) == expected


def test_all_linear_leaves_the_output_head_out_where_the_model_names_one() -> None:
    root = model(1)
    root.get_output_embeddings = lambda: root["lm_head"]
    assert "lm_head" not in names(root, target_modules="all-linear")
    assert "lm_head" in names(root, target_modules=["lm_head"])


@pytest.mark.parametrize("head", ["score", "classifier"])
def test_all_linear_leaves_the_new_head_of_a_classifier_out(head: str) -> None:
    root = nn.ModuleDict({"body": nn.Linear(4, 4), head: nn.Linear(4, 2)})
    assert names(root, target_modules="all-linear", task_type="SEQ_CLS") == ["body"]
    assert get_peft_model(root, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")).targeted_module_names == [
        "body"
    ]


def test_all_linear_leaves_the_inside_of_attention_alone() -> None:
    root = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    assert names(root, target_modules="all-linear") == ["up"]


def test_all_linear_is_kept_as_the_shortest_ends_that_mean_the_same() -> None:
    root, config = model(), LoraConfig(target_modules="all-linear", exclude_modules=["attn.out_proj"])
    resolved = resolve(root, config)
    kept, targets = resolved.config.target_modules, resolved.targets
    assert kept == {"q_proj", "up", "mlp.out_proj", "lm_head"}
    again = resolve(root, LoraConfig(target_modules=kept)).targets
    assert [target.name for target in again] == [target.name for target in targets]


def test_a_layer_with_several_names_is_one_target_and_any_of_them_means_it() -> None:
    root = nn.ModuleDict({"left": nn.Linear(4, 4)})
    root["right"] = root["left"]
    assert names(root, target_modules=["left", "right"]) == ["left"]
    assert names(root, target_modules=["right"]) == ["right"]


@pytest.mark.parametrize(
    ("model_type", "layers", "expected"),
    [("llama", ("q_proj", "k_proj", "v_proj"), ["q_proj", "v_proj"]), ("t5", ("q", "k", "v"), ["q", "v"])],
)
def test_without_targets_the_usual_layers_of_the_architecture_are_taken(
    model_type: str, layers: tuple[str, ...], expected: list[str]
) -> None:
    root = nn.ModuleDict({name: nn.Linear(4, 4) for name in layers})
    for described in (SimpleNamespace(model_type=model_type), {"model_type": model_type}):
        root.config = described
        assert names(root) == expected
    assert get_peft_model(root, LoraConfig()).peft_config["default"].target_modules == set(expected)


def test_an_architecture_without_usual_layers_says_so() -> None:
    root = model()
    root.config = SimpleNamespace(model_type="mine")
    with pytest.raises(TargetError, match="there is no usual choice for models of type 'mine'"):
        names(root)


def ranks(**settings: Any) -> dict[str, tuple[int, float]]:
    config = LoraConfig(**({"target_modules": ["q_proj", "up"], "r": 4, "lora_alpha": 6} | settings))
    return {target.name: (target.rank, target.alpha) for target in resolve(model(), config).targets}


def test_patterns_set_ranks_and_alphas_of_the_layers_they_match() -> None:
    found = ranks(rank_pattern={"up": 2, r"layers\.1\..*": 3}, alpha_pattern={"layers.0.attn.q_proj": 9})
    assert found[UP[0]] == (2, 6)
    assert found[UP[1]] == (2, 6)  # the first key that matches counts
    assert found[Q[1]] == (3, 6)
    assert found[Q[0]] == (4, 9)
    assert found[Q[2]] == (4, 6)


def test_a_pattern_of_ranks_matches_whole_parts_of_a_name() -> None:
    with pytest.raises(TargetError, match=re.escape("rank_pattern: 'proj' matches nothing in the model.")):
        ranks(rank_pattern={"proj": 2})


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 4, 4))
        self.down = nn.Parameter(torch.zeros(2, 4, 4))
        self.inner = nn.Linear(4, 4)


def test_parameters_are_targets_of_their_own() -> None:
    root = nn.ModuleDict({"experts": Routed(), "other": Routed()})
    config = LoraConfig(target_modules=[], target_parameters=["experts.up", "down"], rank_pattern={"down": 3}, r=2)
    found = [(target.name, target.parameter, target.rank) for target in resolve(root, config).targets]
    assert found == [("experts", "up", 2), ("experts", "down", 3), ("other", "down", 3)]


def test_modules_inside_a_module_with_adapted_parameters_can_be_targets_too() -> None:
    root = nn.ModuleDict({"experts": Routed()})
    found = resolve(root, LoraConfig(target_modules=["inner"], target_parameters=["up"])).targets
    assert {(target.name, target.parameter) for target in found} == {("experts.inner", None), ("experts", "up")}


def test_names_are_those_before_wrapping_when_a_second_adapter_comes() -> None:
    adapted = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], r=2))
    inner = adapted.get_base_model()
    assert names(inner, target_modules=["q_proj"]) == Q
    assert names(inner, target_modules="all-linear", exclude_modules=["lm_head"]) == [
        name for i in range(3) for name in (Q[i], ATTN_OUT[i], UP[i], MLP_OUT[i])
    ]
    with pytest.raises(TargetError, match="'base_layer' matches nothing"):
        names(inner, target_modules=["base_layer"])


def test_a_lenient_search_warns_of_what_it_does_not_find_and_takes_the_rest() -> None:
    config = LoraConfig(target_modules=["q_proj", "gone"], rank_pattern={"gone": 3})
    with pytest.warns(UserWarning, match="'gone' matches nothing") as seen:
        found = resolve(model(), config, lenient=True).targets
    assert [target.name for target in found] == Q
    assert len(seen) == 2
