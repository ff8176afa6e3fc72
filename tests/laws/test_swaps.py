"""The law of swaps: an adapter exchanged in place computes, and is saved, as one that was loaded afresh."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from lorafa.errors import AdapterError
from lorafa.surgery.walk import lora_layers
from toys.adapters import DEFINED, VARIANT, train, with_adapter
from toys.compare import assert_same_tensors, close, everything
from toys.layers import Single, backend_for, base_layer, computed_in, input_for

LINEAR = "torch.nn.modules.linear.Linear"
SLOTS = {"lora", "dora", "velora", "dora over velora"}
"""Formulas in which an empty rank adds nothing."""


def saved(folder: Path, base: nn.Module, kind: str, seed: int = 5, **settings: Any) -> Path:
    """The folder of an adapter with other values than any here."""
    model = with_adapter(Single(copy.deepcopy(base)), kind, **settings)
    torch.manual_seed(seed)
    train(model)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, base: nn.Module) -> PeftModel:
    return PeftModel.from_pretrained(Single(copy.deepcopy(base)), folder)


def in_float64(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return base_layer(kind, dtype=torch.float64)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(x)
    return y


def tolerance(kind: str) -> torch.dtype:
    """Adapters on codes are in float32."""
    return torch.float32 if backend_for(kind).quantized else computed_in(kind, torch.float64)


def addresses(model: nn.Module) -> dict[str, int]:
    state = model.state_dict(keep_vars=True)
    return {name: tensor.data_ptr() for name, tensor in state.items() if ".lora_" in name}


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_the_adapter_is_the_new_one_in_the_same_tensors(variant: str, kind: str, tmp_path: Path) -> None:
    base, x, settings = in_float64(kind), input_for(kind, torch.float64), VARIANT[variant]
    model = loaded(saved(tmp_path / "old", base, kind, seed=2, **settings), base)
    new = saved(tmp_path / "new", base, kind, **(settings | {"lora_alpha": 10}))
    fresh = loaded(new, base)
    before, where = outputs(model, x), addresses(model)
    hotswap_adapter(model, new, "default")
    assert addresses(model) == where
    close(outputs(model, x), outputs(fresh, x), tolerance(kind))
    assert not torch.allclose(outputs(model, x), before)
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(fresh))
    for (_, layer), (_, other) in zip(lora_layers(model), lora_layers(fresh), strict=True):
        assert (dict(layer.r), dict(layer.lora_alpha), dict(layer.scaling)) == (
            dict(other.r), dict(other.lora_alpha), dict(other.scaling)
        )  # fmt: skip


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_room_for_ranks_changes_no_output_and_no_file_or_is_refused(variant: str, kind: str) -> None:
    x = input_for(kind, torch.float64)
    torch.manual_seed(0)
    model = with_adapter(Single(in_float64(kind)), kind, **VARIANT[variant])
    train(model)
    before, tensors, state = outputs(model, x), get_peft_model_state_dict(model), everything(model)
    tensors = {key: value.clone() for key, value in tensors.items()}
    if variant not in SLOTS:
        with pytest.raises(AdapterError, match=r"an empty rank would count in .*Nothing was changed"):
            prepare_model_for_compiled_hotswap(model, target_rank=12)
        assert state["objects"] == everything(model)["objects"]
        prepare_model_for_compiled_hotswap(model)
    else:
        prepare_model_for_compiled_hotswap(model, target_rank=12)
        assert all(layer.adapters["default"].A.shape[-2] == 12 for _, layer in lora_layers(model))
        assert all(layer.r["default"] == 4 for _, layer in lora_layers(model))
    close(outputs(model, x), before, tolerance(kind))
    assert_same_tensors(get_peft_model_state_dict(model), tensors)
    assert state["objects"] == everything(model)["objects"]
    assert state["trains"] == everything(model)["trains"]


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in DEFINED if v in SLOTS])
@pytest.mark.parametrize(("rank", "rslora"), [(2, False), (6, True), (12, False)])
def test_adapters_of_other_ranks_take_the_slots(
    variant: str, kind: str, rank: int, rslora: bool, tmp_path: Path
) -> None:
    base, x, settings = in_float64(kind), input_for(kind, torch.float64), VARIANT[variant]
    model = loaded(saved(tmp_path / "old", base, kind, seed=2, **settings), base)
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    where = addresses(model)
    new = saved(tmp_path / "new", base, kind, **(settings | {"r": rank, "lora_alpha": 5, "use_rslora": rslora}))
    fresh = loaded(new, base)
    hotswap_adapter(model, new, "default")
    assert addresses(model) == where
    close(outputs(model, x), outputs(fresh, x), tolerance(kind))
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(fresh))
    hotswap_adapter(model, tmp_path / "old", "default")
    close(outputs(model, x), outputs(loaded(tmp_path / "old", base), x), tolerance(kind))


@pytest.mark.parametrize("groups", [1, 2])
def test_slots_of_a_grouped_convolution_are_shared_out_over_its_groups(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Conv2d(4, 6, 3, groups=groups).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    model = loaded(saved(tmp_path / "old", base, LINEAR, seed=2, r=2), base)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    new = saved(tmp_path / "new", base, LINEAR, r=4, lora_alpha=12)
    hotswap_adapter(model, new, "default")
    fresh = loaded(new, base)
    close(outputs(model, x), outputs(fresh, x))
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(fresh))


@pytest.mark.parametrize("variant", sorted(SLOTS))
def test_what_is_trained_in_slots_stays_within_the_ranks_of_the_adapter(variant: str) -> None:
    models = []
    for slots in (None, 9):
        torch.manual_seed(0)
        model = with_adapter(Single(in_float64(LINEAR)), LINEAR, **VARIANT[variant])
        train(model)
        if slots:
            prepare_model_for_compiled_hotswap(model, target_rank=slots)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_for(LINEAR, torch.float64)).square().sum().backward()
            optimizer.step()
        models.append(model)
    exact, slotted = (get_peft_model_state_dict(model) for model in models)
    for key in exact:
        close(slotted[key], exact[key], 1e-8)
    A = next(layer for _, layer in lora_layers(models[1])).adapters["default"].A
    assert not A[4:].any()


def test_merging_scaling_and_unscaling_go_by_the_new_numbers(tmp_path: Path) -> None:
    base, x = in_float64(LINEAR), input_for(LINEAR, torch.float64)
    model = loaded(saved(tmp_path / "old", base, LINEAR, seed=2), base)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    new = saved(tmp_path / "new", base, LINEAR, r=3, lora_alpha=7)
    fresh = loaded(new, base)
    hotswap_adapter(model, new, "default")
    for one in (model, fresh):
        for _, layer in lora_layers(one):
            layer.set_scale("default", 2.0)
    close(outputs(model, x), outputs(fresh, x), 1e-6)
    for one in (model, fresh):
        for _, layer in lora_layers(one):
            layer.unscale_layer()
    close(outputs(model, x), outputs(fresh, x))
    merged = [one.merge_and_unload() for one in (model, fresh)]
    close(outputs(merged[0], x), outputs(merged[1], x))


def test_a_saved_adapter_has_its_own_rank_and_config(tmp_path: Path) -> None:
    base, x = in_float64(LINEAR), input_for(LINEAR, torch.float64)
    model = loaded(saved(tmp_path / "old", base, LINEAR, seed=2), base)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    new = saved(tmp_path / "new", base, LINEAR, r=3, lora_alpha=7, use_rslora=True)
    hotswap_adapter(model, new, "default")
    model.save_pretrained(tmp_path / "again")
    config = LoraConfig.from_pretrained(tmp_path / "again")
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 7, True)
    close(outputs(loaded(tmp_path / "again", base), x), outputs(loaded(new, base), x))


def test_copies_of_a_prepared_model_have_scalings_of_their_own(tmp_path: Path) -> None:
    base, x = in_float64(LINEAR), input_for(LINEAR, torch.float64)
    model = loaded(saved(tmp_path / "old", base, LINEAR), base)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before, copied = outputs(model, x), copy.deepcopy(model)
    next(layer for _, layer in lora_layers(copied)).scaling["default"] = 0.0
    close(outputs(model, x), before)
    assert not torch.allclose(outputs(copied, x), before)
