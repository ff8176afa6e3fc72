"""The law of merging: merged outputs are adapted outputs, rounded once, and every way back restores every bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.base import LoraLayer
from lorafa.surgery.walk import lora_layers
from toys.adapters import DEFINED, VARIANT, adapted, config_for, only_layer, train, with_adapter, with_starts
from toys.compare import assert_unchanged, close, everything
from toys.layers import IN, KINDS, OUT, Single, backend_for, base_layer, input_for

EXACT = [(v, k) for v, k in DEFINED if not backend_for(k).quantized]
"""NF4 rounds to 4 bits again when merged: no output law there."""
LINEAR = "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(("variant", "kind", "start"), with_starts(EXACT, True, "pissa"))
def test_merged_model_gives_the_outputs_of_the_adapted_model(variant: str, kind: str, start: bool | str) -> None:
    model = adapted(kind, dtype=torch.float64, **VARIANT[variant] | {"init_lora_weights": start}).eval()
    x = input_for(kind, torch.float64)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        close(model(x), expected)
        merged = model.merge_and_unload()
        close(merged(x), expected)
    assert type(merged) is Single
    assert not list(lora_layers(merged))


@pytest.mark.matrix(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("variant", "kind", "start"), with_starts(EXACT, True, "pissa"))
def test_merged_weight_is_the_exact_sum_rounded_once(
    variant: str, kind: str, start: bool | str, dtype: torch.dtype
) -> None:
    """Against float64: float32 arithmetic may move a value across a rounding boundary once in thousands."""
    model = adapted(kind, dtype=dtype, **VARIANT[variant] | {"init_lora_weights": start})
    layer, backend = only_layer(model), backend_for(kind)
    exact = copy.deepcopy(layer).double()
    weight = backend.weight(exact.get_base_layer())
    wanted = (weight + exact.adapters["default"].delta_weight(weight)).to(dtype)
    model.merge_adapter()
    merged = backend.weight(layer.get_base_layer())
    assert merged.dtype is dtype
    assert (merged != wanted).float().mean() < 0.02
    torch.testing.assert_close(merged, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind", "start"), with_starts(DEFINED, True, "pissa"))
def test_unmerging_restores_every_bit_and_every_object(variant: str, kind: str, start: bool | str) -> None:
    model = adapted(kind, dtype=torch.bfloat16, **VARIANT[variant] | {"init_lora_weights": start}).eval()
    before, x = everything(model), input_for(kind, torch.bfloat16)
    expected = model(x)
    model.merge_adapter()
    assert not torch.equal(everything(model)["values"][weight_key(before)], before["values"][weight_key(before)])
    model.unmerge_adapter()
    assert_unchanged(before, model)
    assert torch.equal(model(x), expected)


def weight_key(state: dict[str, dict[str, Tensor]]) -> str:
    ends = ("base_layer.weight", "base_layer.in_proj_weight", "layer.codes", "weight.qdata")
    return next(key for key in state["values"] if key.endswith(ends))


@pytest.mark.matrix(4)
@pytest.mark.parametrize("merged_before", [False, True], ids=["", "while merged"])
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_unload_gives_back_the_model_that_was_handed_in(variant: str, kind: str, merged_before: bool) -> None:
    user_model = Single(base_layer(kind, dtype=torch.bfloat16))
    user_model.requires_grad_(False)
    before = everything(user_model)
    model = with_adapter(user_model, kind, **VARIANT[variant])
    train(model)
    if merged_before:
        model.merge_adapter()
    assert model.unload() is user_model
    assert_unchanged(before, user_model)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_merging_twice_is_merging_once(variant: str, kind: str) -> None:
    model = adapted(kind, dtype=torch.bfloat16, **VARIANT[variant])
    model.merge_adapter()
    once = everything(model)
    model.merge_adapter()
    assert_unchanged(once, model)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("merged", [False, True], ids=["", "while merged"])
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_disabled_model_is_the_base_model_bit_for_bit(variant: str, kind: str, merged: bool) -> None:
    base = Single(base_layer(kind, dtype=torch.float32)).eval()
    x = input_for(kind)
    with torch.no_grad():
        expected = base(x)
        model = with_adapter(base, kind, **VARIANT[variant])
        train(model)
        changed = model.eval()(x)
        if merged:
            model.merge_adapter()
            changed = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), changed)
    assert not torch.equal(changed, expected)


def test_disabling_ends_with_its_block_whatever_happens_in_it_and_nests() -> None:
    model, x = adapted(LINEAR), input_for(LINEAR)
    expected = model(x)
    with pytest.raises(KeyboardInterrupt), model.disable_adapter():
        raise KeyboardInterrupt
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        base = model(x)
        with model.disable_adapter():
            pass
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), expected)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), DEFINED)
def test_delta_weight_has_layout_and_dtype_of_the_stored_weight_and_is_what_merging_adds(
    variant: str, kind: str
) -> None:
    model = adapted(kind, dtype=torch.float64, **VARIANT[variant])
    layer, backend = only_layer(model), backend_for(kind)
    delta = layer.get_delta_weight("default")
    if backend.quantized:
        wanted = backend.weight(layer.get_base_layer()) + delta
        assert delta.shape == (OUT, IN)
        model.merge_adapter()
        assert_holds(layer, kind, wanted)
        return
    name = "in_proj_weight" if layer.kind == "attention" else "weight"
    before = getattr(layer.get_base_layer(), name).detach().clone()
    assert (delta.shape, delta.dtype) == (before.shape, before.dtype)
    model.merge_adapter()
    close(getattr(layer.get_base_layer(), name) - before, delta)
    close(layer.get_delta_weight("default"), delta)  # still against the pristine weight


def assert_holds(layer: LoraLayer, kind: str, wanted: Tensor) -> None:
    """A quantized layer has the codes of ``wanted`` (out, in), rounded to them once."""
    backend = backend_for(kind)
    stored = backend.weight(layer.get_base_layer())
    assert torch.equal(stored, backend.weight(backend.example(wanted, None)))
    # Half the widest gap between two of the sixteen levels of NF4, between -1 and -0.696; other codes are finer.
    assert (stored - wanted).abs().max() <= 0.152 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_add_up_and_a_second_merge_adds_to_the_first(kind: str) -> None:
    model = adapted(kind, dtype=torch.float64)
    model.add_adapter("second", config_for(kind, r=2))
    model.set_adapter("second")
    train(model)
    model.base_model.set_adapter(["default", "second"])
    layer, backend = only_layer(model), backend_for(kind)
    pristine = backend.weight(layer.get_base_layer()).clone()
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    x = input_for(kind, torch.float64)
    with torch.no_grad():
        expected = model.eval()(x)
        model.merge_adapter(["default"])
        model.merge_adapter(["second"])
        assert layer.merged_adapters == ["default", "second"]
        base = layer.get_base_layer()
        if backend.quantized:
            assert_holds(layer, kind, pristine + deltas[0] + deltas[1])
        else:
            close(model(x), expected)
            close(backend.to_layout(base, backend.weight(base)) - backend.to_layout(base, pristine), sum(deltas))
        model.unmerge_adapter()
        assert torch.equal(backend.weight(layer.get_base_layer()), pristine)
        assert torch.equal(model(x), expected)


def test_merging_an_adapter_that_is_not_active_changes_the_outputs_to_its() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64), input_for(LINEAR, torch.float64)
    model.add_adapter("second", config_for(LINEAR, init_lora_weights=False))
    layer = only_layer(model)
    model.merge_adapter(["second"])
    with model.disable_adapter():
        base = model(x)
    close(model(x), base + x @ layer.get_delta_weight("second").T)


def test_lora_bias_is_merged_into_the_bias() -> None:
    model, x = adapted(LINEAR, dtype=torch.float64, lora_bias=True), input_for(LINEAR, torch.float64)
    expected = model(x)
    close(model.merge_and_unload()(x), expected)


def test_lora_bias_cannot_be_merged_where_there_is_no_bias_and_nothing_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], r=2, lora_bias=True))
    train(model)
    before = everything(model)
    with pytest.raises(BackendError, match=r"merged into a Linear without a bias; .* with lora_bias=False"):
        model.merge_adapter()
    assert_unchanged(before, model)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_merging_what_is_not_finite_raises_and_merges_nothing(bad: float) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"], r=2))
    train(model)
    with torch.no_grad():
        model.get_base_model()[1].lora_B["default"].weight[0, 0] = bad
    before = everything(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"Merging 'default' gives inf or nan .* nothing was merged"):
            call()
    assert before["modules"] == everything(model)["modules"]
    assert before["objects"] == everything(model)["objects"]


def test_merge_into_a_grouped_convolution_raises_and_merges_nothing() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2))
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], r=2))
    before = everything(model)
    with pytest.raises(BackendError, match="groups=2"):
        model.merge_and_unload()
    assert_unchanged(before, model)


class Tied(nn.Module):
    """An embedding and a head on one Parameter, and one Linear used at three places, two of them of one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight
        shared = nn.Linear(8, 8)
        self.first, self.again = shared, shared
        self.block = nn.Sequential(shared, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(torch.tanh(self.again(torch.tanh(self.first(self.embed(x)))))))
        return y


def test_layer_used_at_several_places_carries_one_adapter_at_all_of_them() -> None:
    user_model = Tied()
    before = everything(user_model)
    model = get_peft_model(user_model, LoraConfig(target_modules=["first", "again", "block.0"], r=2))
    assert user_model.first is user_model.again is user_model.block[0]
    assert len(list(lora_layers(user_model))) == 1
    train(model)
    x = torch.arange(6)
    expected = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged.first is merged.again is merged.block[0]
    assert merged.embed.weight is merged.head.weight
    torch.testing.assert_close(merged(x), expected)
    user_model = model.unload().requires_grad_(True)
    assert_unchanged(before, user_model)


def test_tied_embedding_keeps_its_head_when_only_the_embedding_is_merged() -> None:
    user_model, x = Tied(), torch.arange(6)
    tied = user_model.embed.weight
    model = get_peft_model(user_model, LoraConfig(target_modules=["embed"], r=2))
    train(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    assert user_model.head.weight is tied
    model.unmerge_adapter()
    assert user_model.embed.get_base_layer().weight is tied is user_model.head.weight


@pytest.mark.parametrize("kind", KINDS)
def test_mode_set_while_merged_holds_after_unmerging(kind: str) -> None:
    model = adapted(kind).train()
    model.merge_adapter()
    model.eval()
    model.unmerge_adapter()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "torchao" not in kind])  # its tensors keep their own
def test_dtype_set_while_merged_holds_after_unmerging(kind: str) -> None:
    model = adapted(kind)
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float64}, "codes stay codes"


def copies(kind: str, model: nn.Module) -> list[nn.Module]:
    """Deep and pickled ones; deep alone where the bare layer cannot be pickled: torchao puts a function on it."""
    if "torchao" in kind:
        with pytest.raises(AttributeError):
            pickle.dumps(base_layer(kind))
        return [copy.deepcopy(model)]
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_survives_deepcopy_and_pickle_and_unmerges_there(kind: str) -> None:
    model, x = adapted(kind).eval(), input_for(kind)
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        merged = model(x)
        for twin in copies(kind, model):
            assert torch.equal(twin(x), merged)
            twin.unmerge_adapter()
            assert torch.equal(twin(x), expected)
        assert torch.equal(model(x), merged), "the copies are copies"
