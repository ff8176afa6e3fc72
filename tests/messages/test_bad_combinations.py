"""What bad combinations get: an error that says what to do, and a model that is bit-identical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError, BackendError, ConfigError, LoraError
from toys.combined import several
from toys.compare import refused
from toys.models import Convolution, Linears, Lookup, Two

FIRST = {"target_modules": ["first"]}


def model(**others: LoraConfig) -> PeftModel:
    """Adapters a and b of one rank on two layers."""
    torch.manual_seed(0)
    on = {"r": 3, "target_modules": ["first", "second"]}
    return several(Linears().double(), a=LoraConfig(**on), b=LoraConfig(lora_alpha=5, **on), **others)


def call(**changed: Any) -> Callable[[PeftModel], Any]:
    given = {"adapters": ["a", "b"], "weights": [1.0, 0.5], "adapter_name": "new"} | changed
    return lambda adapted: adapted.add_weighted_adapter(**given)


BAD_CALLS: dict[str, tuple[Callable[[PeftModel], Any], type[LoraError], str]] = {
    "unknown type": (
        call(combination_type="tie"),
        ConfigError,
        r"combination_type has no value 'tie'\. Did you mean 'ties'",
    ),
    "unknown adapter": (call(adapters=["a", "c"]), AdapterError, r"no adapter 'c'.*It has: a, b"),
    "taken name": (call(adapter_name="b"), AdapterError, r"already has an adapter 'b'"),
    "unusable name": (call(adapter_name="a.b"), AdapterError, "without a dot"),
    "no adapters": (call(adapters=[], weights=[]), AdapterError, "nothing to combine"),
    "a text": (call(adapters="a", weights=1.0), AdapterError, "given as lists"),
    "twice": (call(adapters=["a", "a"]), AdapterError, r"'a' is named twice\. Name it once, with the sum"),
    "lengths": (call(weights=[1.0]), AdapterError, r"2 adapters and 1 weights.*Give each adapter one weight"),
    "nothing": (call(adapters=None, weights=None), AdapterError, "given as lists, found None and None"),
    "weights beyond the range": (
        call(weights=[1.7e308, 1.7e308]),
        AdapterError,
        "first: with these weights the combination has values that float64 cannot hold. Give smaller weights",
    ),
    "the same of matrices": (
        call(weights=[1.7e308, 1.7e308], combination_type="ties_svd", density=0.5),
        AdapterError,
        "values that float64 cannot hold",
    ),
    "the same without a decomposition": (
        call(weights=[1.7e308, 1.7e308], combination_type="cat"),
        AdapterError,
        "values that float64 cannot hold",
    ),
    "infinite weight": (call(weights=[1.0, float("inf")]), ConfigError, r"weight of adapter 'b' must be a number"),
    "weight of nan": (call(weights=[float("nan"), 1.0]), ConfigError, r"weight of adapter 'a'.*finite"),
    "weight as text": (call(weights=["1", 1.0]), ConfigError, r"weight of adapter 'a'.*found '1' \(str\)"),
    "no density": (call(combination_type="ties"), ConfigError, r"'ties' needs density.*Pass density=0\.5"),
    "density 0": (call(combination_type="ties", density=0), ConfigError, r"density must be .*\(0, 1\], found 0"),
    "density 2": (call(combination_type="dare_linear", density=2), ConfigError, r"density must be .*\(0, 1\], found 2"),
    "rank 0": (call(svd_rank=0), ConfigError, "svd_rank must be an integer >= 1"),
    "rank above": (call(svd_rank=11), ConfigError, r"second: svd_rank=11 is more than its matrix of 10 x 20.*10"),
    "clamp": (call(svd_clamp=0.2), ConfigError, r"svd_clamp must be a quantile in \(0\.5, 1\]"),
    "driver": (call(svd_driver="gesvdx"), ConfigError, r"svd_driver has no value 'gesvdx'\. Did you mean"),
    "driver of another device": (call(svd_driver="gesvd"), ConfigError, r"cuSOLVER.*on 'cpu'\. Drop svd_driver"),
    "majority": (call(majority_sign_method="most"), ConfigError, "majority_sign_method has no value 'most'"),
    "seed": (call(seed=-1), ConfigError, "seed must be an integer >= 0"),
}


@pytest.mark.parametrize(("made", "kind", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_cannot_be_carried_out(made: Callable[[PeftModel], Any], kind: type[LoraError], text: str) -> None:
    adapted = model()
    with refused(adapted, kind, text):
        made(adapted)
    assert list(adapted.peft_config) == ["a", "b"]


@pytest.mark.filterwarnings("ignore:combination_type=")
@pytest.mark.parametrize("kind", ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_types_about_factors_need_equal_ranks(kind: str) -> None:
    adapted = model(c=LoraConfig(r=2, **FIRST))
    with refused(adapted, ConfigError, rf"first: combination_type='{kind}'.*equal ranks, found 'a' 3, 'c' 2.*'cat'"):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new", kind, density=0.5)


@pytest.mark.filterwarnings("ignore:combination_type=")
@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_types_about_factors_refuse_dora(kind: str) -> None:
    adapted = model(c=LoraConfig(r=3, use_dora=True, **FIRST))
    with refused(
        adapted, BackendError, r"first: the update of adapter 'c' is no product.*DoRA.*Take one of svd, ties_svd"
    ):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new", kind, density=0.5)


def test_adapters_that_change_with_the_input_are_refused_by_name() -> None:
    adapted = model(c=LoraConfig(r=3, alora_invocation_tokens=[3], **FIRST))
    with refused(
        adapted, BackendError, r"Combining adapter 'c': its update of 'first' \(alora\) changes with the input"
    ):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new")


def test_goat_is_refused_by_name() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="goat", **FIRST)
    adapted = get_peft_model(Two(), config, "moe")
    with refused(adapted, BackendError, r"Combining adapter 'moe'.*\(goat\)"):
        adapted.add_weighted_adapter(["moe"], [1.0], "new")


def test_modules_trained_in_full_by_two_or_by_a_weight_are_refused() -> None:
    saved = {"modules_to_save": ["head"], **FIRST}
    adapted = model(c=LoraConfig(r=3, **saved), d=LoraConfig(r=3, **saved))
    with refused(adapted, AdapterError, r"'c' and 'd' both have 'head' trained in full"):
        adapted.add_weighted_adapter(["c", "d"], [1.0, 1.0], "new")
    with refused(adapted, AdapterError, r"'c' has 'head' trained in full.*cannot be weighted by 0\.5.*weight 1"):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 0.5], "new")


def test_a_config_that_no_longer_says_where_its_adapter_is() -> None:
    adapted = model()
    for config in adapted.peft_config.values():
        config.target_modules = {"first"}
    with refused(adapted, AdapterError, r"cannot be put into one config: second would be on one side only"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")


def test_trained_biases_of_the_base_are_refused() -> None:
    adapted = model(c=LoraConfig(r=3, bias="lora_only", **FIRST))
    with refused(adapted, AdapterError, r"'c' trains biases of the base \(bias='lora_only'\)"):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new")


def test_loftq_is_refused() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights="loftq", loftq_config={"loftq_iter": 1}, **FIRST)
    adapted = several(Two(), a=config)
    with refused(adapted, AdapterError, r"first: the start of adapter 'a' has quantized this layer \(LoftQ\)"):
        adapted.add_weighted_adapter(["a"], [1.0], "new")


def test_a_rank_that_groups_do_not_divide() -> None:
    torch.manual_seed(0)
    on = {"r": 4, "target_modules": ["conv"]}
    adapted = several(Convolution(2, groups=2), a=LoraConfig(**on), b=LoraConfig(**on))
    with refused(adapted, ConfigError, r"conv: svd_rank=3 is not divisible by the convolution's groups=2"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", svd_rank=3)


def test_values_that_are_not_finite_or_not_there() -> None:
    adapted = model()
    with torch.no_grad():
        adapted.base_model.model.second.lora_A["b"].weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="second: adapter 'b' holds values that are not finite"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    adapted.add_adapter("empty", LoraConfig(r=3, **FIRST), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match="first: adapter 'empty' has no values"):
        adapted.add_weighted_adapter(["a", "empty"], [1.0, 1.0], "new")
    assert list(adapted.peft_config) == ["a", "b", "empty"]


def test_biases_of_B_beside_an_embedding() -> None:
    torch.manual_seed(0)
    one, other = LoraConfig(target_modules=["head"], lora_bias=True), LoraConfig(target_modules=["table"])
    adapted = several(Lookup(), a=one, b=other)
    with refused(adapted, ConfigError, "table: lora_bias is not defined on embedding layers"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")


def test_factors_of_which_only_a_part_is_here() -> None:
    adapted = model()
    adapted.base_model.model.second.lora_A["b"].weight.ds_numel = 10**6
    with refused(adapted, AdapterError, r"second: only parts of adapter 'b' are in this process.*before the model is"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")


def test_a_factor_that_was_replaced() -> None:
    adapted = model()
    adapted.base_model.model.first.lora_A["a"] = nn.Linear(12, 3)
    with refused(adapted, AdapterError, "lora_A or lora_B of adapter 'a' was replaced by one with a bias"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")


def test_a_failure_on_the_way_takes_the_new_adapter_back(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = model(c=LoraConfig(r=3, modules_to_save=["head"], **FIRST))

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lorafa.layers.wrapper.Wrapper.copy_values", fails)
    before = list(adapted.state_dict())
    with pytest.raises(MemoryError):
        adapted.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new")
    assert list(adapted.state_dict()) == before
    assert "new" not in adapted.peft_config


def test_what_a_type_does_not_read_is_said_and_linear_says_what_it_sums() -> None:
    adapted = model()
    with pytest.warns(UserWarning, match="combination_type='cat' does not read density, svd_rank: it changes nothing"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "one", "cat", density=0.5, svd_rank=4)
    with pytest.warns(UserWarning, match="'linear' sums A with A and B with B, as PEFT does"):
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "two", "linear")
