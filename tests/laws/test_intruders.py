"""The law of the repair: the copy's weight is W' + (lambda - 1) sum sigma' u' v'^T, on every layer and formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import PeftModel, reduce_intruder_dimension
from lorafa.layers.base import LoraLayer
from lorafa.surgery.walk import lora_layers
from toys.adapters import DEFINED, VARIANT, adapted, only_layer, starts_of
from toys.compare import best, close, everything
from toys.layers import input_for

CASES = [(variant, kind, start) for variant, kind in DEFINED for start in starts_of(variant, True, "pissa")]


def is_quick(variant: str, kind: str, start: bool | str) -> bool:
    """Every formula on a linear layer, and LoRA and DoRA on every kind."""
    return kind.endswith("linear.Linear") or (variant in ("lora", "dora") and start is True)


MARKED = [pytest.param(*case, marks=[] if is_quick(*case) else [pytest.mark.slow]) for case in CASES]


def model_of(variant: str, kind: str, start: bool | str = True, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = VARIANT[variant] | {"init_lora_weights": VARIANT[variant].get("init_lora_weights", start)} | settings
    return adapted(kind, dtype=torch.float64, **settings).eval()


def repaired_by_hand(
    layer: LoraLayer, top_k: int, epsilon: float, lam: float
) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
    """W' and W'' of each matrix of a layer by whole decompositions of dense matrices, and which are intruders."""
    weight = layer.base_weight().double()
    tuned = layer.merged_weight(["default"]).double()
    before, after, which = [], [], []
    for W, W1 in zip(*(t if t.dim() == 3 else t[None] for t in (weight, tuned)), strict=True):
        U = torch.linalg.svd(W, full_matrices=False).U
        U1, S1, V1 = torch.linalg.svd(W1, full_matrices=False)
        cosines = (U1.mT @ U).abs().amax(1)[:top_k]
        chosen = [j for j in range(len(cosines)) if cosines[j] < epsilon]
        taken = U1[:, chosen] * S1[chosen] @ V1[chosen]
        before.append(W1)
        after.append(W1 + (lam - 1) * taken)
        which.append(chosen)
    return before, after, which


def matrices(weight: Tensor) -> list[Tensor]:
    return [*(weight if weight.dim() == 3 else weight[None]).double()]


def rounding(layer: LoraLayer) -> float:
    """Factors on quantized bases, or what those are dequantized to, are in float32."""
    dtypes = {layer.adapters["default"].A.dtype, layer.base_weight().dtype}
    return 1e-7 if dtypes == {torch.float64} else 1e-4


@pytest.mark.parametrize(("variant", "kind", "start"), MARKED)
def test_exact_copy_has_the_weight_of_the_formula(variant: str, kind: str, start: bool | str) -> None:
    model = model_of(variant, kind, start)
    wanted = {p: repaired_by_hand(layer, 4, 0.9, 0.25) for p, layer in lora_layers(model.get_base_model())}
    done = reduce_intruder_dimension(model, "default", "mended", 4, 0.9, 0.25, None, exact=True)
    assert model.active_adapters == ["mended"]
    assert done.discarded == 0
    for path, layer in lora_layers(model.get_base_model()):
        before, after, which = wanted[path]
        assert [(i.expert or 0, i.place) for i in done.layers[path].intruders] == [
            (number, j) for number, chosen in enumerate(which) for j in chosen
        ]
        for found, W2, W1 in zip(matrices(layer.merged_weight(["mended"])), after, before, strict=True):
            close(found, W2, rounding(layer))
            assert torch.equal(found, W1) or not torch.equal(W1, W2)
    assert done.intruders > 0


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("variant", ["lora", "dora", "kasa"])
def test_of_the_singular_values_those_of_the_intruders_become_lambda_times_theirs(variant: str, lam: float) -> None:
    model = model_of(variant, "torch.nn.modules.linear.Linear")
    values = torch.linalg.svdvals(only_layer(model).merged_weight(["default"]))
    done = reduce_intruder_dimension(model, "default", "mended", 4, 0.9, lam, None, exact=True)
    (found,) = done.layers.values()
    for one in found.intruders:
        assert one.singular_value == pytest.approx(float(values[one.place]), rel=1e-9)
        values[one.place] *= lam
    assert done.intruders
    close(torch.linalg.svdvals(only_layer(model).merged_weight(["mended"])), values.sort(descending=True).values, 1e-7)


@pytest.mark.parametrize(("variant", "kind", "start"), MARKED)
def test_lambda_of_one_and_no_intruder_copy_the_update_bit_for_bit(variant: str, kind: str, start: bool | str) -> None:
    for settings in ({"mitigation_lambda": 1.0, "threshold_epsilon": 1.0}, {"threshold_epsilon": 0.0}):
        model = model_of(variant, kind, start)
        x = input_for(kind, torch.float64)
        before = {path: layer.merged_weight(["default"]) for path, layer in lora_layers(model.get_base_model())}
        output = model(x).detach()
        done = reduce_intruder_dimension(model, logging_sink=None, **settings)
        assert (done.intruders > 0) == ("mitigation_lambda" in settings)
        for path, layer in lora_layers(model.get_base_model()):
            assert torch.equal(layer.merged_weight(["intruder_reduced"]), before[path])
        close(model(x), output)
        model.set_adapter("default")
        assert torch.equal(model(x), output)


@pytest.mark.parametrize("kind", sorted({kind for variant, kind, _ in CASES if variant == "lora"}))
@pytest.mark.parametrize("rslora", [False, True])
def test_default_copy_is_the_nearest_of_the_rank_and_says_what_it_loses(kind: str, rslora: bool) -> None:
    model = model_of("lora", kind, use_rslora=rslora)
    weights = {path: layer.base_weight().double() for path, layer in lora_layers(model.get_base_model())}
    wanted = {p: repaired_by_hand(layer, 4, 0.9, 0.25) for p, layer in lora_layers(model.get_base_model())}
    done = reduce_intruder_dimension(model, "default", "mended", 4, 0.9, 0.25, None)
    lost_of_all, whole_of_all = 0.0, 0.0
    for path, layer in lora_layers(model.get_base_model()):
        adapter, lost, whole = layer.adapters["mended"], 0.0, 0.0
        assert adapter.rank == done.layers[path].rank == 4
        assert float(adapter.scaling) == float(layer.adapters["default"].scaling)
        for found, W, W2 in zip(
            matrices(layer.merged_weight(["mended"])), matrices(weights[path]), wanted[path][1], strict=True
        ):
            close(found - W, best(W2 - W, 4), rounding(layer))
            lost += float((W2 - W - best(W2 - W, 4)).square().sum())
            whole += float((W2 - W).square().sum())
        assert done.layers[path].discarded == pytest.approx(lost, rel=1e-4, abs=1e-12)
        assert done.layers[path].energy == pytest.approx(whole, rel=1e-4)
        lost_of_all, whole_of_all = lost_of_all + lost, whole_of_all + whole
    assert done.share == pytest.approx(lost_of_all / whole_of_all, rel=1e-4)
    assert 0 < done.share < 1


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("variant", "start"), [(v, s) for v in VARIANT for s in starts_of(v, True, "pissa")])
def test_copy_is_saved_and_loaded(tmp_path: Path, variant: str, start: bool | str, exact: bool) -> None:
    kind = "torch.nn.modules.linear.Linear"
    model = model_of(variant, kind, start)
    reduce_intruder_dimension(model, threshold_epsilon=0.9, mitigation_lambda=0.5, logging_sink=None, exact=exact)
    model.save_pretrained(tmp_path, selected_adapters=["intruder_reduced"])
    weight = only_layer(model).merged_weight(["intruder_reduced"])
    base = model_of(variant, kind, start).unload()
    again = PeftModel.from_pretrained(base, tmp_path / "intruder_reduced")
    close(only_layer(again).merged_weight(["default"]), weight)


def test_the_old_adapter_and_the_base_stay_as_they_were() -> None:
    model = model_of("dora", "torch.nn.modules.linear.Linear")
    before = everything(model)["values"]
    reduce_intruder_dimension(model, threshold_epsilon=1.0, logging_sink=None)
    after = everything(model)["values"]
    assert all(torch.equal(after[key], value) for key, value in before.items())
