"""What a combination is beside its numbers: its config, its file, what is trained beside the factors, its report."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorafa import LoraConfig, PeftModel
from lorafa.numerics.linalg import full_svd
from lorafa.surgery.combination import Combination, LayerError
from lorafa.surgery.combine_layer import Share, combine_layer
from lorafa.surgery.combining import Combining
from toys.combined import deltas, distance, several, weighted
from toys.compare import assert_equal_bits, close
from toys.language_models import llama
from toys.models import Attention, Linears, Lookup, Mixture

ON = {"r": 3, "target_modules": ["first", "second"]}


def linears(**changed: Any) -> PeftModel:
    torch.manual_seed(0)
    return several(Linears().double(), a=LoraConfig(**ON | changed), b=LoraConfig(lora_alpha=5, **ON))


def reloaded(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, folder, "new")


# ---- config and file


def test_the_config_has_only_what_says_where_it_is_and_how_large() -> None:
    model = linears(init_lora_weights="pissa", use_rslora=True, rank_pattern={"second": 4})
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "cat")
    config = model.peft_config["new"]
    assert config.init_lora_weights is True
    assert (config.use_rslora, config.bias) == (False, "none")
    assert config.target_modules == {"first", "second"}
    ranks = {"first": 2 * 3 + 3, "second": 2 * 4 + 3}
    assert {name: layer.r["new"] for name, layer in model.base_model.lora_layers()} == ranks
    other = next(name for name in ranks if ranks[name] != config.r)
    assert config.rank_pattern == config.alpha_pattern == {f"^{other}": ranks[other]}


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (["first"], ["second", "first"], {"first", "second"}),
        ("fir.*", "sec.*", "(?:fir.*)|(?:sec.*)"),
        ("fir.*", "fir.*", "fir.*"),
        (["first"], "sec.*", "first|second"),
    ],
)
def test_targets_are_put_together(one: Any, other: Any, wanted: Any) -> None:
    torch.manual_seed(0)
    model = several(Linears(), a=LoraConfig(target_modules=one), b=LoraConfig(target_modules=other))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")
    assert model.peft_config["new"].target_modules == wanted


def test_layers_are_named_in_full_where_one_adapter_leaves_out_what_another_is_on() -> None:
    torch.manual_seed(0)
    model = several(
        llama(),
        a=LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]),
        b=LoraConfig(target_modules=["v_proj", "q_proj"], exclude_modules=["layers.1.self_attn.q_proj"]),
    )
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "cat")
    config = model.peft_config["new"]
    assert (config.layers_to_transform, config.exclude_modules) == (None, None)
    assert len(str(config.target_modules).split("|")) == 4
    assert distance(deltas(model, "new"), weighted(model, {"a": 0.5, "b": 0.5})) < 1e-6


@pytest.mark.parametrize("kind", ["cat", "svd", "dare_ties_svd"])
@pytest.mark.parametrize(
    ("base", "configs"),
    [
        (Attention, [{"target_modules": ["attention", "head"]}, {"target_modules": ["attention"], "r": 2}]),
        (
            Attention,
            [
                {"target_modules": ["attention"], "attention_out_proj_twice": True, "lora_bias": True},
                {"target_modules": ["attention"]},
            ],
        ),
        (
            Mixture,
            [
                {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
                {"target_modules": [], "target_parameters": ["experts.down"], "r": 3},
            ],
        ),
        (Lookup, [{"target_modules": ["table", "head"]}, {"target_modules": ["table"], "r": 2, "use_rslora": True}]),
    ],
)
def test_what_is_saved_is_what_was_made(
    base: type[nn.Module], configs: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pristine = base()
    made = {name: LoraConfig(**({"r": 4} | config)) for name, config in zip("ab", configs, strict=True)}
    model = several(copy.deepcopy(pristine), **made)
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "new", kind, density=0.5 if "dare" in kind else None)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    read = reloaded(pristine, tmp_path / "new")
    found, wanted = deltas(read, "new"), deltas(model, "new")
    if kind == "cat":
        assert distance(wanted, weighted(model, {"a": 0.5, "b": -1.0})) < 1e-6
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert_equal_bits(found[path], value)


def test_the_result_is_trained_and_deleted_like_any_adapter_and_shares_no_memory_with_its_parts() -> None:
    model = linears()
    model.add_weighted_adapter(["a"], [1.0], "new")
    layer = model.base_model.model.first
    assert layer.lora_A["new"].weight.data_ptr() != layer.lora_A["a"].weight.data_ptr()
    model.set_adapter("new")
    assert layer.lora_A["new"].weight.requires_grad
    model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    assert float(layer.lora_B["new"].weight.grad.abs().max()) > 0
    model.delete_adapter("new")
    assert list(model.peft_config) == ["a", "b"]


def test_a_scaling_set_by_hand_counts() -> None:
    model = linears()
    for _, layer in model.base_model.lora_layers():
        layer.set_scale("a", 3.7)
    wanted = weighted(model, {"a": 1.0, "b": 2.0})
    model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "sum", "cat")
    model.add_weighted_adapter(["a"], [1.0], "twin")
    assert distance(deltas(model, "sum"), wanted) < 1e-14
    assert all(torch.equal(deltas(model, "twin")[path], value) for path, value in deltas(model, "a").items())


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_scaling_of_zero_is_an_update_of_zero(combination: str) -> None:
    model = linears()
    for _, layer in model.base_model.lora_layers():
        layer.set_scale("a", 0.0)
    model.add_weighted_adapter(["a"], [1.0], "zero", combination)
    assert all(not delta.any() for delta in deltas(model, "zero").values())
    assert all(layer.scaling["zero"] == 1.0 for _, layer in model.base_model.lora_layers())
    model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "sum", combination)
    assert distance(deltas(model, "sum"), weighted(model, {"b": 2.0})) < 1e-12


@pytest.mark.parametrize("outer", [1.0, 0.0])
@pytest.mark.parametrize("twice", [False, True])
def test_a_copy_on_attention_has_one_scaling_for_both_ends_and_the_update_of_each(
    twice: bool, outer: float, tmp_path: Path
) -> None:
    """A config has no other scaling for the output projection than for the attention around it."""
    torch.manual_seed(0)
    pristine = Attention().double()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["attention"], attention_out_proj_twice=twice, lora_bias=True
    )
    model = several(copy.deepcopy(pristine), a=config)
    layers = dict(model.base_model.lora_layers())
    layers["attention"].set_scale("a", outer)
    layers["attention.base_layer.out_proj"].set_scale("a", 3.0)
    wanted, biases = deltas(model, "a"), {path: layer.adapters["a"].scaled_bias for path, layer in layers.items()}
    model.add_weighted_adapter(["a"], [1.0], "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    for made in (model, reloaded(pristine, tmp_path / "new")):
        assert distance(deltas(made, "new"), wanted) < 1e-14
        for path, layer in made.base_model.lora_layers():
            close(layer.adapters["new"].scaled_bias, biases[path], 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_the_widest_of_the_factors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = several(Linears().to(torch.bfloat16), a=LoraConfig(**ON))
    model.add_adapter("b", LoraConfig(**ON), autocast_adapter_dtype=dtype is torch.float32)
    model.add_adapter("c", LoraConfig(**ON), autocast_adapter_dtype=False)
    model.add_weighted_adapter(["b", "c"], [1.0, 0.5], "new")
    assert model.base_model.model.first.lora_A["new"].weight.dtype is dtype


# ---- what is trained beside the factors


def test_a_module_that_one_adapter_has_trained_in_full_is_copied() -> None:
    torch.manual_seed(0)
    model = several(Linears(), a=LoraConfig(**ON), b=LoraConfig(modules_to_save=["head"], **ON), c=LoraConfig(**ON))
    model.add_weighted_adapter(["a", "b"], [-0.5, 1.0], "new")
    head = model.base_model.model.head
    assert torch.equal(head.modules_to_save["new"].weight, head.modules_to_save["b"].weight)
    assert head.modules_to_save["new"].weight.data_ptr() != head.modules_to_save["b"].weight.data_ptr()
    assert model.peft_config["new"].modules_to_save == ["head"]
    model.add_weighted_adapter(["a", "c"], [-0.5, 1.0], "without")
    assert "without" not in head.modules_to_save


def test_rows_of_an_embedding_that_one_adapter_has_trained_are_copied() -> None:
    torch.manual_seed(0)
    model = several(
        Lookup(),
        a=LoraConfig(target_modules=["head"]),
        b=LoraConfig(target_modules=["head"], trainable_token_indices={"table": [1, 5]}),
    )
    model.add_weighted_adapter(["a", "b"], [0.5, 1.0], "new")
    rows = model.base_model.model.table.token_adapter.trainable_tokens_delta
    assert torch.equal(rows["new"], rows["b"])


# ---- settings of the SVD


def share(A: torch.Tensor, B: torch.Tensor, **changed: Any) -> Share:
    return Share(**{"adapter": "a", "weight": 1.0, "scaling": 0.5, "A": A, "B": B} | changed)


@pytest.mark.parametrize("quantile", [0.6, 0.9, 1.0])
def test_a_clamp_cuts_both_factors_at_the_quantile_of_all_entries_and_is_in_the_error(quantile: float) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 20).double(), torch.randn(15, 3).double()
    made = combine_layer(Combining(svd_clamp=quantile), "x", [share(A, B), share(A.flip(1), B, adapter="b")], of=2)
    matrix = 0.5 * B @ (A + A.flip(1))
    svd = full_svd(matrix).at(slice(0, 3))
    factors = svd.Vh, svd.U * svd.S
    entries = torch.cat([f.flatten() for f in factors])
    limit = float(torch.quantile(torch.cat([entries, -entries]), quantile))
    close(made.A, factors[0].clamp(-limit, limit), 1e-12)
    close(made.B, factors[1].clamp(-limit, limit), 1e-12)
    assert made.error.lost == pytest.approx(float((matrix - made.B @ made.A).square().sum()), rel=1e-9, abs=1e-12)


def test_a_rank_beyond_what_is_there_adds_rows_that_change_nothing_and_can_learn() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 20).double(), torch.randn(15, 2).double()
    made = combine_layer(Combining(svd_rank=6), "x", [share(A, B)], of=1)
    close(made.B @ made.A, 0.5 * B @ A, 1e-12)
    assert made.A.shape == (6, 20)
    close(made.A @ made.A.T, torch.eye(6).double(), 1e-12)
    assert float(made.B[:, 2:].abs().max()) == 0.0


def test_linear_has_the_cross_terms_and_says_how_large_they_are() -> None:
    torch.manual_seed(0)
    shares = [share(torch.randn(3, 20).double(), torch.randn(15, 3).double(), weight=w) for w in (0.7, -2.0)]
    made = combine_layer(Combining("linear"), "x", shares, of=2)
    s, t = (abs(one.weight * one.scaling) ** 0.5 for one in shares)
    A, B = s * shares[0].A - t * shares[1].A, s * shares[0].B + t * shares[1].B
    close(made.A, A, 1e-12)
    close(made.B, B, 1e-12)
    wanted = sum(one.weight * one.scaling * one.B @ one.A for one in shares)
    assert made.error.relative == pytest.approx(float((B @ A - wanted).norm() / wanted.norm()), rel=1e-9)


@pytest.mark.parametrize("alpha", [1, 8, 5, 0.3, 1.7e4, 5e-5])
@pytest.mark.parametrize("rank", [1, 3, 7, 64])
@pytest.mark.parametrize("stacked", [1, 2])
def test_the_alpha_of_a_copy_gives_its_scaling_to_the_bit(alpha: float, rank: int, stacked: int) -> None:
    A, B = torch.randn(stacked * rank, 5), torch.randn(4, stacked * rank)
    made = combine_layer(Combining(), "x", [share(A, B, scaling=alpha / rank)], of=1)
    assert made.alpha / (stacked * rank) == made.scaling == alpha / rank


@pytest.mark.parametrize("rank", [3, 7, 13])
def test_a_root_that_is_no_quotient_is_met_to_the_last_digit(rank: int) -> None:
    scaling = 16 / rank**0.5
    made = combine_layer(Combining(), "x", [share(torch.randn(rank, 5), torch.randn(4, rank), scaling=scaling)], of=1)
    assert made.alpha / rank == pytest.approx(scaling, rel=5e-16)


# ---- the report


def test_the_report_has_layers_and_totals_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = linears()
    with caplog.at_level(logging.INFO, logger="lorafa"):
        report = model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", svd_rank=2)
    assert caplog.messages == [str(report)]
    assert "new: svd on 2 layers, rank 2; error " in str(report)
    assert set(report.layers) == {"first", "second"}
    assert report.energy == pytest.approx(sum(layer.energy for layer in report.layers.values()))
    assert report.relative == pytest.approx((report.lost / report.energy) ** 0.5)
    assert report.worst(1)[0][1].relative == max(layer.relative for layer in report.layers.values())
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_report_says_where_there_is_nothing_to_compare_with() -> None:
    made = Combination("new", "ties", {"x": LayerError(3, 2.0, None), "y": LayerError(4, 2.0, None)})
    assert (made.lost, made.relative, made.worst()) == (None, None, [])
    assert str(made).startswith("new: ties on 2 layers, ranks 3 to 4; the factors are merged as tensors")
    assert "nothing of what was asked for is lost" in str(Combination("new", "cat", {"x": LayerError(3, 2.0, 0.0)}))
    assert LayerError(1, 0.0, 0.0).relative == 0.0


def test_files_hold_no_trace_of_the_parts(tmp_path: Path) -> None:
    model = linears(init_lora_weights="kasa")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    keys = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {key.rpartition("lora_")[2] for key in keys} == {"A.weight", "B.weight"}
