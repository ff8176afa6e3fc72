"""The linear layers of a base quantized when it is loaded: which, what they compute then, and what is said of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorafa import LoraConfig, get_peft_model
from lorafa.backends import backend_of
from lorafa.errors import ConfigError
from lorafa.models import QUANTIZERS
from lorafa.models.quantize import quantize_linears
from toys.language_models import seq2seq_logits, t5

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
OFF = {"nf4": 0.12, "int8": 0.01, "bnb4": 0.12, "bnb8": 0.01, "torchao_int8": 0.01}
PACKAGES = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "torchao_int8": "torchao"}


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).eval()


def codes(model: nn.Module) -> list[str]:
    backends = {name: backend_of(module) for name, module in model.named_modules()}
    return [name for name, backend in backends.items() if backend is not None and backend.quantized]


def installed(way: str) -> str:
    if way in PACKAGES:
        pytest.importorskip(PACKAGES[way])
    return way


def test_every_way_is_tested() -> None:
    assert OFF.keys() == set(QUANTIZERS.names())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", QUANTIZERS.names())
def test_all_linear_layers_of_the_body_are_quantized_and_nothing_else(way: str, tied: bool) -> None:
    model, x = llama(tie_word_embeddings=tied), torch.arange(12)[None]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    before, everything = {n: model.get_submodule(n).weight.detach().clone() for n in names}, model.num_parameters()
    others = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in names}
    y = model(x).logits
    said = quantize_linears(model, installed(way))
    assert codes(model) == names
    assert all(model.get_parameter(name) is value for name, value in others.items())
    lost = size = torch.zeros(())
    for name, weight in before.items():
        layer = model.get_submodule(name)
        lost = lost + (backend_of(layer).weight(layer) - weight).square().sum()  # type: ignore[union-attr]
        size = size + weight.square().sum()
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert said.off == pytest.approx(float((lost / size).sqrt()), rel=1e-4)
    assert 0.5 * OFF[way] < said.off < OFF[way]
    assert (said.layers, said.weights, said.all) == (len(names), sum(w.numel() for w in before.values()), everything)
    assert said.in_words().startswith(f"Quantized as {way}: 14 linear layers with ")
    assert 0 < (model(x).logits - y).norm() / y.norm() < 3 * OFF[way]


def test_what_is_trained_whole_and_what_several_modules_share_stays_dense() -> None:
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    second.down_proj = first.down_proj
    quantize_linears(model, "nf4", ["q_proj", "layers.1.self_attn"])
    assert codes(model) == [
        "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("way", QUANTIZERS.names())
def test_what_a_model_keeps_in_float32_stays_dense_because_its_code_looks_at_the_weight(way: str) -> None:
    model: Any = t5().eval()
    expected = seq2seq_logits(model)
    quantize_linears(model, installed(way))
    assert codes(model)
    assert not [name for name in codes(model) if name.endswith(".wo")]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    actual = seq2seq_logits(adapted)
    assert (actual - expected).norm() < 3 * OFF[way] * expected.norm()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(number: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[1, 2] = number
    text = r"model\.quantize=nf4 cannot quantize model\.layers\.0\.self_attn\.v_proj: its weight holds nan or inf"
    with pytest.raises(ConfigError, match=text):
        quantize_linears(model, "nf4")


def test_a_model_without_linear_layers_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.quantize=nf4 quantizes linear layers, and this Llama"):
        quantize_linears(llama(), "nf4", ["layers"])


def test_weights_that_lie_the_other_way_round_are_turned() -> None:
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model, x = GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes)).eval(), torch.arange(12)[None]
    y = model(x).logits
    assert quantize_linears(model, "int8").layers == 4
    assert (model(x).logits - y).norm() / y.norm() < 0.02


@pytest.mark.parametrize("way", PACKAGES)
def test_a_missing_package_is_named_with_the_layer_the_setting_and_the_way_out(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGES[way]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, PACKAGES[way], None)
    text = (
        rf"model\.quantize={way} cannot quantize model\.layers\.0\.self_attn\.q_proj: it needs {PACKAGES[way]}, which "
        rf"is not installed\. Install it \(pip install {PACKAGES[way]}\), or set model\.quantize=nf4 or int8"
    )
    with pytest.raises(ConfigError, match=text):
        quantize_linears(llama(), way)


def test_a_way_of_ones_own_is_one_line_and_is_to_give_what_a_back_end_knows() -> None:
    made: list[torch.Size] = []

    def mine(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        made.append(weight.shape)
        return nn.Identity()

    with (
        QUANTIZERS.added("mine", mine),
        pytest.raises(ConfigError, match=r"model\.quantize=mine makes a Identity of .*q_proj, which no back end knows"),
    ):
        quantize_linears(llama(), "mine")
    assert made == [torch.Size([64, 64])]
