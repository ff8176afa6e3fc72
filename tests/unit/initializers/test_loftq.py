"""LoftQ (arXiv:2310.08659): the codes, the fit to what they lose, the base that is replaced, files and their bases."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafa import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from lorafa.backends.int8 import Int8Linear
from lorafa.backends.nf4 import NF4Linear
from lorafa.backends.quantized import QuantizedLinear
from lorafa.errors import AdapterError, BackendError, CheckpointError, LoraError
from lorafa.initializers.base import InitResult
from lorafa.initializers.loftq import QUANTIZERS, loftq
from lorafa.spec import LayerSpec
from toys import compare
from toys.adapters import train
from toys.compare import assert_unchanged, everything
from toys.language_models import seq2seq_logits, t5
from toys.layers import Experts

WEIGHT = torch.randn(80, 64, generator=torch.Generator().manual_seed(1))
RANK, SCALING = 6, 2.5


def start(weight: Tensor = WEIGHT, *, bits: int = 4, turns: int = 1, **spec: Any) -> InitResult:
    settings = LoftQConfig(loftq_bits=bits, loftq_iter=turns)
    values = {"name": "layer", "kind": "linear", "rank": RANK, "scaling": SCALING, "seed": 0, "settings": settings}
    return loftq(weight, {}, LayerSpec(**values | spec))


def codes_of(result: InitResult) -> Tensor:
    assert result.quantized is not None
    return result.quantized.dequantize(torch.float64)


# ---- algorithm 1 of the paper


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("scaling", [1.0, 0.25, 4.0])
def test_a_and_b_are_the_best_that_rank_r_can_do_for_the_codes_whatever_the_scaling(
    bits: int, turns: int, scaling: float
) -> None:
    """Eckart-Young: ||W - Q - s B A||_F is the tail of the spectrum of W - Q. PEFT leaves 1 / sqrt(s) out."""
    result = start(bits=bits, turns=turns, scaling=scaling)
    lost = WEIGHT.double() - codes_of(result)
    left = torch.linalg.matrix_norm(lost - scaling * result.B.double() @ result.A.double())
    tail = torch.linalg.svdvals(lost)[RANK:].square().sum().sqrt()
    torch.testing.assert_close(left, tail, rtol=1e-5, atol=0)
    assert left < torch.linalg.matrix_norm(WEIGHT - QUANTIZERS[bits](WEIGHT).dequantize())
    torch.testing.assert_close(result.A @ result.A.T, result.B.T @ result.B, rtol=1e-4, atol=1e-5)  # balanced


@pytest.mark.parametrize("bits", [4, 8])
def test_the_fit_is_as_good_where_the_whole_matrix_is_not_decomposed(bits: int) -> None:
    """What rounding lost is noise, whose singular values lie close together: the block Krylov method's worst case."""
    weight = torch.randn(384, 320, generator=torch.Generator().manual_seed(1))
    result = start(weight, bits=bits, rank=4)
    lost = weight.double() - codes_of(result)
    left = torch.linalg.matrix_norm(lost - SCALING * result.B.double() @ result.A.double())
    torch.testing.assert_close(left, torch.linalg.svdvals(lost)[4:].square().sum().sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_after_t_alternations_are_those_of_the_weight_without_the_fit_before(bits: int) -> None:
    def best(matrix: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(matrix)
        return (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]

    wanted = quantizer(WEIGHT) if (quantizer := QUANTIZERS[bits]) else None
    for turns in (1, 2, 3):
        found = start(bits=bits, turns=turns).quantized
        assert type(found) is quantizer
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scale, wanted.scale)
        wanted = quantizer(WEIGHT.double() - best(WEIGHT.double() - wanted.dequantize(torch.float64)))


def test_codes_do_not_depend_on_seed_scaling_adapter_or_name() -> None:
    one = start(turns=3).quantized
    other = start(turns=3, seed=5, scaling=0.1, key="second", name="elsewhere").quantized
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_the_codes_hold_exactly_leaves_b_zero_and_a_random(bits: int) -> None:
    """Both zero would never train."""
    exact = QUANTIZERS[bits](WEIGHT).dequantize()
    result = start(QUANTIZERS[bits](exact).dequantize(), bits=bits)
    assert not result.B.any()
    assert torch.linalg.matrix_rank(result.A) == RANK


# ---- in a model


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 80, bias=False)
        self.head = nn.Linear(80, 8)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.act(self.first(x))))
        return y


X = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))


def config(bits: int = 4, turns: int = 1, **settings: Any) -> LoraConfig:
    values = {"target_modules": ["first", "second"], "r": RANK, "lora_alpha": 15, "init_lora_weights": "loftq"}
    loftq_config = LoftQConfig(loftq_bits=bits, loftq_iter=turns)
    return LoraConfig(**values | {"loftq_config": loftq_config} | settings)  # type: ignore[arg-type]


def adapted(bits: int = 4, turns: int = 1, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    return get_peft_model(Model(dtype), config(bits, turns, **settings)).eval()


def quantized_alone(bits: int) -> Model:
    model = Model()
    model.first, model.second = (QUANTIZERS[bits].from_linear(layer) for layer in (model.first, model.second))
    return model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_model_is_nearer_to_the_dense_one_than_with_codes_alone(
    bits: int, turns: int, settings: dict[str, Any]
) -> None:
    x = torch.randn(500, 64)
    dense, codes, fitted = (model(x) for model in (Model(), quantized_alone(bits), adapted(bits, turns, **settings)))
    assert (fitted - dense).norm() < 0.95 * (codes - dense).norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_layers_are_replaced_and_the_dense_weights_are_gone(bits: int) -> None:
    dense = Model()
    bias = dense.first.bias
    model = get_peft_model(dense, config(bits))
    for name in ("first", "second"):
        base = model.get_base_model().get_submodule(f"{name}.base_layer")
        assert type(base) is QUANTIZERS[bits]
        assert base.training
    assert model.get_base_model().first.bias is bias
    assert not any(tuple(p.shape) in ((48, 64), (80, 48)) for p in model.parameters())
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_unload_leaves_the_quantized_layers_and_merging_the_merged_ones() -> None:
    model = adapted(8)
    train(model)
    layer = model.get_base_model().second
    base, wanted = layer.base_layer, layer.base_weight() + layer.get_delta_weight("default")
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged.second.dequantize(), Int8Linear(wanted).dequantize())
    plain = model.unload()
    assert plain.second is base
    assert type(plain.first) is Int8Linear


def test_conv1d_of_gpt2_is_quantized_too() -> None:
    model = nn.Sequential(Conv1D(48, 64))
    weight = model[0].weight.T.clone()
    adapter = get_peft_model(model, config(target_modules=["0"], fan_in_fan_out=True))
    assert torch.equal(model[0].base_layer.codes, NF4Linear(weight).codes)
    assert adapter(X).shape == (7, 48)


# ---- files


def same_outputs(model: PeftModel, base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    loaded = PeftModel.from_pretrained(base, folder, **options)
    assert torch.equal(loaded(X.to(model.get_base_model().head.weight.dtype)), model(X.to(model.head.weight.dtype)))
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"freeze_A": True}], ids=str)
@pytest.mark.parametrize(("bits", "turns"), [(4, 1), (4, 3), (8, 2)])
def test_a_trained_adapter_comes_back_on_the_dense_base_and_on_the_quantized_one(
    bits: int, turns: int, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(bits, turns, dtype, **settings)
    train(model)
    model.save_pretrained(tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = same_outputs(model, Model(dtype), tmp_path / "first")
        again = same_outputs(model, Model(dtype), tmp_path / "first", low_cpu_mem_usage=True)
        on_codes = same_outputs(model, again.unload(), tmp_path / "first")
    assert type(loaded.get_base_model().first.base_layer) is QUANTIZERS[bits]
    on_codes.save_pretrained(tmp_path / "second")  # knows the dense weights, though it never saw them
    same_outputs(model, Model(dtype), tmp_path / "second")


def test_a_second_adapter_finds_the_base_quantized_as_it_needs_it(tmp_path: Path) -> None:
    model = adapted()
    train(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    second = model(X)
    model.set_adapter("default")
    assert torch.equal(second, model(X))
    train(model)
    model.load_adapter(tmp_path, "default")  # as resuming a run does
    assert torch.equal(second, model(X))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_replaced_layers_are_trained_and_stored(bias: str, tmp_path: Path) -> None:
    model = adapted(bias=bias)
    train(model)
    assert not torch.equal(model.get_base_model().first.base_layer.bias, Model().first.bias)
    model.save_pretrained(tmp_path)
    same_outputs(model, Model(), tmp_path)


def test_other_weights_and_other_codes_are_refused(tmp_path: Path) -> None:
    adapted(4).save_pretrained(tmp_path)
    other = Model()
    with torch.no_grad():
        other.second.weight.mul_(1.5)
    refused(other, CheckpointError, "made for another base model: 1 of 2 .* second", load(tmp_path))
    codes = quantized_alone(8)
    text = r"layers quantized otherwise: 2 of 2 hold other codes here: first, second\. Load it on the dense model"
    refused(codes, CheckpointError, text, load(tmp_path))
    same = PeftModel.from_pretrained(quantized_alone(4), tmp_path)
    assert torch.equal(same(X), adapted(4)(X))


def test_a_base_in_another_dtype_gives_other_codes_and_a_warning(tmp_path: Path) -> None:
    adapted(4).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 of 2 layers are quantized to other codes .* first, second\. The base is"):
        PeftModel.from_pretrained(Model(torch.bfloat16), tmp_path)


def test_a_later_adapter_on_the_codes_is_known_by_the_dense_weights(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.save_pretrained(tmp_path, selected_adapters=["plain"])
    other = Model()
    with torch.no_grad():
        other.first.weight.mul_(1.5)
    refused(other, CheckpointError, "made for another base model", load(tmp_path / "plain"))
    PeftModel.from_pretrained(Model(), tmp_path / "plain")


# ---- what cannot be replaced


def refused(model: nn.Module, kind: type[LoraError], text: str, call: Callable[[nn.Module], object]) -> None:
    with compare.refused(model, kind, text):
        call(model)


def load(folder: Path) -> Callable[[nn.Module], object]:
    return lambda model: PeftModel.from_pretrained(model, folder)


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.tied, self.hooked = nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(8, 8)
        self.conv, self.table, self.codes = nn.Conv1d(8, 8, 3), nn.Embedding(10, 8), NF4Linear(torch.randn(8, 8))
        self.attention, self.experts = nn.MultiheadAttention(8, 2), Experts(torch.randn(3, 8, 8))
        self.tied.weight = self.table.weight
        self.hooked.register_forward_hook(lambda module, inputs, output: None)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


SAYS = "init_lora_weights='loftq' quantizes dense linear layers"
NOT_REPLACED = {
    "conv": f"{SAYS}, and 'conv' is a Conv1d. Leave it out with exclude_modules, or choose",
    "attention": f"{SAYS}, and 'attention' is a MultiheadAttention. Leave it out",
    "codes": f"{SAYS}, and 'codes' is a NF4Linear, quantized already. .* fit that with replace_lora_weights_loftq",
    "hooked": f"{SAYS}, but hooks are on 'hooked', which would be lost. Remove them, or put them on later",
    "normed": f"{SAYS}, and 'normed' is a ParametrizedLinear. Leave it out",
    "tied": f"{SAYS}, but 'table' and 'tied' share one weight, .* Leave them out with exclude_modules",
}


@pytest.mark.parametrize("layer", NOT_REPLACED)
def test_layers_that_are_not_dense_or_not_alone_are_refused_by_name(layer: str) -> None:
    settings = config(target_modules=["dense", layer], r=2)
    refused(Kinds(), BackendError, NOT_REPLACED[layer], lambda model: get_peft_model(model, settings))


def test_tables_and_experts_are_refused_by_name() -> None:
    class Table(nn.Sequential):
        pass

    experts = config(target_modules=[], target_parameters=["experts.weight"], r=2)
    refused(Kinds(), BackendError, f"{SAYS}, and 'experts.weight' is a Experts", lambda m: get_peft_model(m, experts))
    table = config(target_modules=["0"], r=2)
    alone = Table(nn.Embedding(10, 8))
    refused(alone, BackendError, f"{SAYS}, and '0' is a Embedding", lambda model: get_peft_model(model, table))


def test_a_layer_with_other_adapters_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["second"]), "plain")
    text = rf"{SAYS}, but 'second' carries other adapters \('plain'\), .* Take them off with unload\(\)"
    refused(model, AdapterError, text, lambda m: m.add_adapter("more", config()))  # type: ignore[operator]
    refused(model, AdapterError, text, lambda m: m.load_adapter(tmp_path, "more"))  # type: ignore[operator]


def test_what_fails_while_the_adapter_is_put_on_brings_the_dense_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafa.layers.base import LoraLayer

    attach, calls = LoraLayer.attach, []

    def fail(self: LoraLayer, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        attach(self, *args)

    monkeypatch.setattr(LoraLayer, "attach", fail)
    model = Model()
    before = everything(model)
    with pytest.raises(MemoryError):
        get_peft_model(model, config())
    assert_unchanged(before, model)


def test_a_weight_that_is_not_finite_stays_and_starts_as_by_default(tmp_path: Path) -> None:
    model = Model()
    with torch.no_grad():
        model.first.weight[0, 0] = float("inf")
    with pytest.warns(UserWarning, match=r"'loftq' has nothing to start from on 1 of 2 layers.*first \(its weight is"):
        get_peft_model(model, config())
    assert type(model.first.base_layer) is nn.Linear
    assert isinstance(model.second.base_layer, QuantizedLinear)


def test_a_model_that_looks_at_the_weight_of_a_layer_gets_the_values_of_its_codes() -> None:
    """T5 asks its wo for the dtype that it brings the states to."""
    start: dict[str, Any] = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}
    model = get_peft_model(t5().eval(), LoraConfig(r=4, target_modules="all-linear", **start))
    expected, actual = seq2seq_logits(t5().eval()), seq2seq_logits(model.eval())
    assert (actual - expected).norm() < 0.3 * expected.norm()
    layer = next(layer for path, layer in model.base_model.lora_layers() if path.endswith(".wo"))
    assert torch.equal(layer.weight, layer.base_weight())
