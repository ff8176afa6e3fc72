"""The law of plug-ins: a start or a variant that enters its registry works at once, with no edit anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.adapter import Adapter, Extra, Variant
from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers import INITIALIZERS, find_start
from lorafa.initializers.base import InitResult, initializer
from lorafa.spec import LayerSpec
from lorafa.surgery.apply import apply
from lorafa.surgery.available import unavailable
from lorafa.surgery.plan import plan
from lorafa.surgery.resolve import resolve
from lorafa.variants import VARIANTS, asking_settings
from toys.adapters import config_for, train
from toys.compare import close

LINEAR = "torch.nn.modules.linear.Linear"


@dataclass
class ConstantSettings:
    size: float = 0.5


def _at_most_four(rank: int, found: str) -> None:
    if rank > 4:
        raise ConfigError(f"init_lora_weights='constant' goes up to rank 4, found {found}.")


@initializer(also=("Uniform", "constant_times_N"), settings=ConstantSettings, check_rank=_at_most_four)
def constant(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A is ``size`` everywhere, times the number in the name; B is zero."""
    A_shape, B_shape = spec.stored_shapes(weight)
    return InitResult(torch.full(A_shape, spec.settings.size * (spec.number or 1)), torch.zeros(B_shape))


@initializer(needs=("mean",))
def from_mean(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """Every row of A is the mean of the inputs, B is zero."""
    A_shape, B_shape = spec.stored_shapes(weight)
    return InitResult(stats["mean"].expand(A_shape).clone(), torch.zeros(B_shape))


@initializer(settings="eva_config")
def direction(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """A as large as PEFT's field of settings says."""
    A_shape, B_shape = spec.stored_shapes(weight)
    return InitResult(torch.full(A_shape, float(spec.settings.rho)), torch.zeros(B_shape))


class Diagonal(Variant):
    """s B diag(d) A with d of length r, which starts at a setting."""

    name = "diagonal"
    switch = "use_qalora"
    extras = {"diagonal": Extra("lora_between")}  # noqa: RUF012
    hosts = frozenset({"linear"})

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start

    @classmethod
    def of(cls, config: LoraConfig, spec: LayerSpec, inner: Variant | None = None) -> Diagonal:
        return cls(float(config.qalora_group_size))

    def shapes(self, weight: Tensor, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return super().shapes(weight, spec) | {"diagonal": (spec.rank,)}

    def initial_extras(self, weight: Tensor, A: Tensor, B: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        return {"diagonal": torch.full((spec.rank,), self.start)}

    def delta_weight(self, adapter: Adapter, weight: Tensor) -> Tensor:
        return adapter.scaling * (adapter.B * adapter.extra("diagonal")) @ adapter.A

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        return adapter.layer.low_rank(x, adapter.A, adapter.B * adapter.extra("diagonal"), adapter.scaling)


class Other(Diagonal):
    name = "other"
    switch = "velora_config"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    taken = {name: VARIANTS.get(name) for name in ("qalora", "velora") if name in VARIANTS}
    for name in taken:
        VARIANTS.remove(name)  # whose fields they take
    try:
        with (
            INITIALIZERS.added("constant", constant),
            INITIALIZERS.added("from_mean", from_mean),
            INITIALIZERS.added("direction", direction),
            VARIANTS.added("diagonal", Diagonal),
            VARIANTS.added("other", Other),
        ):
            yield
    finally:
        for name, variant in taken.items():
            VARIANTS.add(name, variant)


def A_of(model: PeftModel) -> Tensor:
    A: Tensor = model.get_base_model().layer.factor_A("default")
    return A


@pytest.mark.parametrize(
    ("value", "settings", "expected"),
    [
        ("constant", None, 0.5),
        ("Constant", {"size": 2.0}, 2.0),
        ("uniform", ConstantSettings(3.0), 3.0),
        ("constant_times_4", {"size": 0.25}, 1.0),
    ],
)
def test_a_registered_start_is_taken_by_its_names_with_its_settings(
    value: str, settings: object, expected: float
) -> None:
    config = config_for(LINEAR, init_lora_weights=value, init_config=settings)
    assert torch.equal(A_of(get_peft_model(Model(), config)), torch.full((4, 8), expected))
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_a_start_may_take_its_settings_from_a_field_of_peft() -> None:
    config = config_for(LINEAR, init_lora_weights="direction", eva_config={"rho": 3.0})
    assert unavailable(config) == []
    assert torch.equal(A_of(get_peft_model(Model(), config)), torch.full((4, 8), 3.0))


def test_a_start_gets_the_statistics_of_its_layer_and_is_refused_without_them() -> None:
    config, mean = config_for(LINEAR, init_lora_weights="from_mean"), torch.arange(8.0)
    model = Model()
    with pytest.raises(CalibrationError, match="init_lora_weights='from_mean' needs mean of 'layer'; none was given"):
        plan(resolve(model, config), "default")
    apply(model, plan(resolve(model, config), "default", stats={"layer": {"mean": mean}}))
    assert torch.equal(model.layer.factor_A("default"), mean.expand(4, 8))


def test_a_start_says_which_settings_and_ranks_it_takes() -> None:
    with pytest.raises(ConfigError, match=r"'constant' goes up to rank 4, found rank_pattern\['q'\]=5\."):
        LoraConfig(init_lora_weights="constant", r=4, rank_pattern={"q": 5})
    with pytest.raises(ConfigError, match=r"init_config \(ConstantSettings\) has no setting 'sise'"):
        LoraConfig(init_lora_weights="constant", r=4, init_config={"sise": 1})
    with pytest.raises(
        ConfigError, match=r"init_config is set but would be ignored: init_lora_weights is 'gaussian'\. Drop"
    ):
        LoraConfig(init_lora_weights="gaussian", init_config={"size": 1})
    with pytest.raises(ConfigError, match=r"init_lora_weights has no value 'konstant'. Did you mean 'constant'\?"):
        LoraConfig(init_lora_weights="konstant")


def test_an_adapter_from_a_start_that_peft_does_not_know_is_a_file_that_peft_reads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = get_peft_model(Model(), config_for(LINEAR, init_lora_weights="constant", init_config={"size": 2.0}))
    train(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 8)
    close(peft.PeftModel.from_pretrained(Model(), tmp_path)(x), model(x), torch.float32)
    close(PeftModel.from_pretrained(Model(), tmp_path)(x), model(x), torch.float32)


def test_a_registered_variant_is_chosen_by_its_switch_trained_merged_saved_and_loaded(tmp_path: Path) -> None:
    config = config_for(LINEAR, use_qalora=True, qalora_group_size=2)
    assert unavailable(config) == []
    model, x = get_peft_model(Model(), config), torch.randn(5, 8)
    layer = model.get_base_model().layer
    assert isinstance(layer.adapters["default"].variant, Diagonal)
    assert torch.equal(layer.lora_between["default"].weight, torch.full((4,), 2.0))
    close(model(x), Model()(x), torch.float32)
    train(model)
    expected = model(x)
    assert not torch.allclose(expected, Model()(x), atol=1e-2)
    A, B, d = layer.factor_A("default"), layer.factor_B("default"), layer.lora_between["default"].weight
    close(expected, Model()(x) + 1.5 * x @ A.T @ torch.diag(d) @ B.T, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Model(), tmp_path)
    assert torch.equal(loaded(x), expected)
    on_meta = PeftModel.from_pretrained(Model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(on_meta(x), expected)
    close(loaded.merge_and_unload()(x), expected, torch.float32)
    model.delete_adapter("default")
    assert list(layer.lora_between) == []


def test_switches_of_two_variants_exclude_each_other() -> None:
    message = (
        r"use_qalora=True and velora_config=VeloraConfig\(.*\) ask for two formulas, diagonal and other, .* "
        "Drop one of the two"
    )
    with pytest.raises(ConfigError, match=message):
        LoraConfig(use_qalora=True, velora_config={})
    changed = LoraConfig(velora_config={})
    changed.use_qalora = True
    with pytest.raises(ConfigError, match=message):
        get_peft_model(Model(), changed)


def test_a_variant_without_a_place_for_a_bias_refuses_one() -> None:
    with pytest.raises(ConfigError, match=r"lora_bias=True does not work with use_qalora=True. Drop one of the two\."):
        LoraConfig(use_qalora=True, lora_bias=True)


def test_every_variant_but_plain_lora_has_a_switch_or_a_start_of_its_own() -> None:
    assert sorted(asking_settings()) == sorted(set(VARIANTS.names()) - {"lora"})


def test_no_two_starts_share_a_name_and_each_is_found_by_its_own() -> None:
    spelled = [name.lower() for name in INITIALIZERS.names()]
    spelled += [str(value).lower() for name in INITIALIZERS.names() for value in INITIALIZERS.get(name).also]
    assert len(spelled) == len(set(spelled))
    assert all(find_start(name).name == name for name in INITIALIZERS.names())  # type: ignore[union-attr]
