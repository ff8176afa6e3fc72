"""The law of numbers: PEFT's tables on a layer are views of what the adapter owns, and a write through them acts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from lorafa import mutate_base, restore_base
from lorafa.errors import AdapterError
from lorafa.surgery.walk import lora_layers
from toys.adapters import DEFINED, VARIANT, adapted, only_layer
from toys.compare import close
from toys.layers import input_for

LINEAR = "torch.nn.modules.linear.Linear"


@pytest.mark.matrix(4)
@pytest.mark.parametrize("value", [0.0, 3.0, torch.tensor(3.0, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in DEFINED if "dora" not in v])
def test_a_written_scaling_is_the_factor_of_the_update(variant: str, kind: str, value: float | Tensor) -> None:
    model, x = adapted(kind, dtype=torch.float64, **VARIANT[variant]).eval(), input_for(kind, torch.float64)
    layer = only_layer(model)
    dtype = layer.adapters["default"].A.dtype  # float32 on codes
    with torch.no_grad():
        once, factor = layer.adapters["default"].product(), float(value) / 1.5  # at a scaling of 1.5
        for _, one in lora_layers(model):
            one.scaling["default"] = value
        close(layer.adapters["default"].product(), once * factor, dtype)
        with model.disable_adapter():
            base = model(x)
        changed = model(x) - base
        if layer.kind == "attention":  # its output is no linear function of the update
            assert torch.allclose(changed, torch.zeros_like(changed)) == (float(value) == 0.0)
            return
        for _, one in lora_layers(model):
            one.scaling["default"] = 1.5
        close(changed, (model(x) - base) * factor, dtype)


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5)], ids=str)
def test_a_scaling_written_while_the_start_is_out_of_the_base_gives_what_it_gives_otherwise(
    value: float | Tensor,
) -> None:
    x = torch.randn(3, 8)
    model = adapted(LINEAR, init_lora_weights="pissa").eval()
    layer = only_layer(model)
    mutate_base(model)
    assert layer.without_start
    layer.scaling["default"] = value
    changed = model(x)
    restore_base(model)
    close(model(x), changed, torch.float32)
    assert not layer.without_start


def test_a_merged_update_stays_as_it_was_merged_and_the_new_scaling_counts_after_it() -> None:
    model, x = adapted(LINEAR).eval(), torch.randn(3, 8)
    layer = only_layer(model)
    base = layer.base_layer(x)
    before = model(x)
    model.merge_adapter()
    layer.scale_layer(2.0)
    close(model(x), before, torch.float32)
    model.unmerge_adapter()
    close(model(x) - base, 2 * (before - base), torch.float32)


def test_tables_read_as_dictionaries_and_know_the_adapters_of_the_layer() -> None:
    layer = only_layer(adapted(LINEAR, use_rslora=True))
    assert layer.r == {"default": 4}
    assert layer.lora_alpha == {"default": 6}
    assert layer.scaling == {"default": 3.0}
    assert layer.use_rslora == {"default": True}
    assert layer.use_dora == {"default": False}
    assert layer.lora_bias == {"default": False}
    assert dict(layer.scaling.items()) == {"default": 3.0}
    assert "other" not in layer.scaling
    assert layer.scaling.get("other") is None
    assert repr(layer.r) == "{'default': 4}"
    assert only_layer(adapted(LINEAR, use_dora=True)).use_dora == {"default": True}


def test_a_table_may_be_updated_as_a_whole() -> None:
    layer = only_layer(adapted(LINEAR))
    layer.scaling |= {"default": 4.0}
    assert layer.adapters["default"].scaling == 4.0
    layer.scaling = {"default": 5.0}
    assert layer.adapters["default"].scaling == 5.0
    layer.lora_alpha["default"] = 12
    layer.unscale_layer()
    assert layer.scaling["default"] == 12 / 4


def test_copies_have_numbers_of_their_own() -> None:
    model = adapted(LINEAR)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        only_layer(copied).scaling["default"] = 9.0
        assert only_layer(copied).adapters["default"].scaling == 9.0
        assert only_layer(copied).adapters["default"].layer is only_layer(copied)
    assert only_layer(model).scaling["default"] == 1.5


def test_a_scaling_in_a_tensor_is_read_anew_by_compiled_code_without_compiling_again() -> None:
    model, x = adapted(LINEAR).eval(), torch.randn(3, 8)
    layer, compilations = only_layer(model), []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    scaling = torch.tensor(1.5)
    layer.scaling["default"] = scaling
    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        base = layer.base_layer(x)
        first = compiled(x)
        assert compilations
        known = len(compilations)
        scaling.fill_(3.0)
        close(compiled(x) - base, 2 * (first - base), torch.float32)
    assert len(compilations) == known


@pytest.mark.parametrize("table", ["use_dora", "lora_bias"])
def test_what_follows_from_how_an_adapter_was_made_cannot_be_written(table: str) -> None:
    layer = only_layer(adapted(LINEAR))
    getattr(layer, table)["default"] = False
    with pytest.raises(AdapterError, match=rf"{table}\['default'\] is False since the adapter was made, and cannot be"):
        getattr(layer, table)["default"] = True


@pytest.mark.parametrize("value", ["2", None, True, torch.ones(2), torch.tensor(2)], ids=repr)
def test_a_scaling_that_is_no_number_is_refused(value: object) -> None:
    layer = only_layer(adapted(LINEAR))
    with pytest.raises(AdapterError, match="is a number or a floating-point tensor without dimensions, found"):
        layer.scaling["default"] = value
    assert layer.scaling["default"] == 1.5


def test_a_scaling_that_asks_for_a_gradient_is_refused_for_it_gets_none() -> None:
    layer = only_layer(adapted(LINEAR))
    with pytest.raises(AdapterError, match=r"gets no gradient, and the tensor requires one\. Pass scaling\.detach"):
        layer.scaling["default"] = torch.tensor(2.0, requires_grad=True)


def test_entries_come_and_go_with_their_adapters() -> None:
    layer = only_layer(adapted(LINEAR))
    with pytest.raises(AdapterError, match=r"scaling: the layer has no adapter 'other', only default\. Add it with"):
        layer.scaling["other"] = 1.0
    with pytest.raises(AdapterError, match="scaling shows a number that adapter 'default' owns"):
        del layer.scaling["default"]
