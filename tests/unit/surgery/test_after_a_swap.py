"""What is made of an adapter in slots, or of one exchanged for one on fewer layers, is what its file would give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorafa import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    reduce_intruder_dimension,
    save_as_lora,
)
from lorafa.export.source import of_model
from lorafa.inspection.updates import updates_in
from lorafa.surgery.combining import COMBINATIONS
from lorafa.surgery.walk import lora_layers
from toys.combined import deltas, density_for, distance
from toys.models import Convolution
from toys.swaps import X, adapted, loaded, saved

WEIGHTS = {"default": 0.5, "other": -2.0}


def with_other(model: PeftModel, **settings: object) -> PeftModel:
    """The model with a second adapter, of the same numbers whatever is done to the first."""
    torch.manual_seed(7)
    model.add_adapter("other", LoraConfig(**({"r": 3, "target_modules": ["first"]} | settings)))
    for _, layer in lora_layers(model.get_base_model()):
        for parameter in layer.stored_parameters("other").values() if "other" in layer.adapters else ():
            torch.nn.init.normal_(parameter.data)
    return model


def in_slots(**settings: object) -> PeftModel:
    model = adapted(**{"r": 3, **settings})
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    return model


def ranks(model: PeftModel, name: str) -> dict[str, int]:
    return {p: layer.adapters[name].A.shape[-2] for p, layer in lora_layers(model.get_base_model())
            if name in layer.adapters}  # fmt: skip


@pytest.mark.filterwarnings("ignore:combination_type='linear' sums")
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_combination_is_that_of_the_ranks_that_are_used(combination: str) -> None:
    made = []
    for model in (adapted(r=3), in_slots()):
        with_other(model).add_weighted_adapter(
            [*WEIGHTS], [*WEIGHTS.values()], "new", combination, seed=3, **density_for(combination)
        )
        made.append(model)
    assert ranks(made[1], "new") == ranks(made[0], "new")
    assert distance(deltas(made[1], "new"), deltas(made[0], "new")) < 1e-12


def test_a_copy_of_one_adapter_has_its_own_rank() -> None:
    model = in_slots(use_rslora=True)
    model.add_weighted_adapter(["default"], [1.0], "twin")
    assert ranks(model, "twin") == {"first": 3, "second": 3}
    assert distance(deltas(model, "twin"), deltas(model, "default")) == 0


def test_slots_of_a_grouped_convolution_are_left_out_group_by_group() -> None:
    on = {"r": 4, "target_modules": ["conv"]}
    plain, prepared = (adapted(lambda: Convolution(1, groups=2), **on) for _ in range(2))
    prepare_model_for_compiled_hotswap(prepared, target_rank=8)
    x, outputs = torch.randn(2, 4, 9, dtype=torch.float64), []
    for model in (plain, prepared):
        with_other(model, target_modules=["conv"], r=2)
        model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "new", "cat")
        model.set_adapter("new")
        outputs.append(model(x).detach())
    assert ranks(prepared, "new") == ranks(plain, "new") == {"conv": 6}
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("exact", [False, True])
def test_a_repair_keeps_the_rank_that_is_used(settings: dict[str, bool], exact: bool) -> None:
    plain, prepared = adapted(r=3, **settings), in_slots(**settings)
    asked = {"top_k": 4, "threshold_epsilon": 0.9, "logging_sink": None, "exact": exact}
    one, other = (reduce_intruder_dimension(model, **asked) for model in (plain, prepared))
    assert one.intruders > 0
    assert {p: r.rank for p, r in other.layers.items()} == {p: r.rank for p, r in one.layers.items()}
    assert other.share == pytest.approx(one.share, abs=1e-12)
    assert distance(deltas(prepared, "intruder_reduced"), deltas(plain, "intruder_reduced")) < 1e-10


def test_factors_to_export_have_no_free_slots() -> None:
    found = of_model(in_slots(), "somewhere")
    assert {update.path: (update.rank, tuple(update.A.shape)) for update in found.updates} == {
        "first": (3, (3, 12)), "second": (3, (3, 20))
    }  # fmt: skip


def test_what_is_measured_has_no_free_slots_and_no_layers_that_were_emptied(tmp_path: Path) -> None:
    model = in_slots()
    found = {update.name: tuple(update.A.shape) for update, _ in updates_in(model.get_base_model(), "default")}
    assert found == {"first": (3, 12), "second": (3, 20)}
    hotswap_adapter(model, saved(tmp_path, r=2, target_modules=["second"]), "default")
    found = {update.name: tuple(update.A.shape) for update, _ in updates_in(model.get_base_model(), "default")}
    assert found == {"second": (2, 20)}


@pytest.mark.filterwarnings("ignore:combination_type='linear' sums")
@pytest.mark.parametrize("combination", [kind for kind in COMBINATIONS if "dare" not in kind])
@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_layers_that_an_exchange_has_emptied_are_in_no_combination(
    tmp_path: Path, combination: str, names: list[str]
) -> None:
    new = saved(tmp_path / "new", r=3, target_modules=["second"])
    model, fresh = adapted(r=3), loaded(new)
    hotswap_adapter(model, new, "default")
    for one in (model, fresh):
        with_other(one).add_weighted_adapter(
            names, [WEIGHTS[name] for name in names], "new", combination, **density_for(combination)
        )
    assert distance(deltas(model, "new"), deltas(fresh, "new")) < 1e-12


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_layers_that_an_exchange_has_emptied_are_neither_repaired_nor_converted(
    tmp_path: Path, settings: dict[str, bool]
) -> None:
    new = saved(tmp_path / "new", r=3, target_modules=["second"], **settings)
    model, fresh = adapted(r=3, **settings), loaded(new)
    hotswap_adapter(model, new, "default")
    wanted = fresh(X)
    config, tensors = convert_to_lora(model, 1.0)
    assert config.target_modules == {"second"}
    assert {key.split(".")[2] for key in tensors} == {"second"}
    save_as_lora(tmp_path / "plain", model, 1.0)
    torch.testing.assert_close(loaded(tmp_path / "plain")(X), wanted, rtol=1e-10, atol=1e-10)
    done = reduce_intruder_dimension(model, mitigation_lambda=1.0, logging_sink=None)
    assert done.layers.keys() == {"second"}
    torch.testing.assert_close(model(X), wanted, rtol=1e-10, atol=1e-10)
