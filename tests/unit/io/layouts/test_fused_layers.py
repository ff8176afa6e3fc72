"""Files of models with fused layers on models without, and the other way round: the same update, to rounding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa import LoraConfig, PeftModel
from lorafa.errors import CheckpointError
from toys.compare import refused
from toys.layouts import (
    FUSED,
    HEADS,
    IDS,
    INNER,
    KEYS,
    LAYERS,
    WIDTH,
    Model,
    assert_loads,
    by_hand,
    pairs,
    peft_config,
    peft_file,
    updates,
    write,
)

WHOLE = {"self_attn.qkv_proj": (HEADS + 2 * KEYS, WIDTH), "mlp.gate_up_proj": (2 * INNER, WIDTH)} | {
    "mlp.down_proj": (WIDTH, INNER)
}
PARTS, SIZES = ("q_proj", "k_proj", "v_proj"), [8, 4, 4]
TARGETS = [name.rpartition(".")[2] for name in LAYERS]


def fused_updates(single: dict[str, Tensor]) -> dict[str, Tensor]:
    """The updates of a fused model's layers out of those of the parts, with zeros for what has none."""
    found = {name: update for name, update in single.items() if name.endswith("down_proj")}
    for block in range(2):
        for whole, parts in FUSED.items():
            rows = [single.get(f"model.layers.{block}.{p}", torch.zeros(LAYERS[p], dtype=torch.float64)) for p in parts]
            found[f"model.layers.{block}.{whole}"] = torch.cat(rows)
    return found


def test_the_toy_computes_the_same_fused_and_not() -> None:
    split, whole = Model(), Model(fused=True)
    for block in range(2):
        for name, parts in FUSED.items():
            for kind in ("weight", "bias"):
                values = [split.get_parameter(f"model.layers.{block}.{part}.{kind}") for part in parts]
                whole.get_parameter(f"model.layers.{block}.{name}.{kind}").data = torch.cat(values).detach()
    own = split.state_dict()
    whole.load_state_dict({key: own.get(key, value) for key, value in whole.state_dict().items()})
    torch.testing.assert_close(split(IDS), whole(IDS))


# ---- fused in the file


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 3}}])
def test_rows_of_a_fused_layer_go_to_its_parts(tmp_path: Path, settings: dict[str, Any]) -> None:
    factors = pairs(WHOLE)
    down = 3 if "rank_pattern" in settings else 2
    factors |= {n: p for n, p in pairs(WHOLE, down).items() if n.endswith("down_proj")}
    folder = write(tmp_path, peft_file(factors), peft_config("qkv_proj", "gate_up_proj", "down_proj", **settings))
    scaling = {n: 6 / (math.sqrt(2) if settings.get("use_rslora") else len(A)) for n, (A, _) in factors.items()}
    expected = {}
    for name, (A, B) in factors.items():
        owner, _, leaf = name.rpartition("self_attn.") if "self_attn" in name else name.rpartition("mlp.")
        parts = FUSED.get(f"{'self_attn' if 'self_attn' in name else 'mlp'}.{leaf}")
        update = scaling[name] * B @ A
        if parts is None:
            expected[name] = update
            continue
        for part, rows in zip(parts, update.split([LAYERS[p][0] for p in parts]), strict=True):
            expected[f"{owner}{part}"] = rows
    model = assert_loads(Model(), folder, by_hand(Model(), expected))
    assert sorted(model.peft_config["default"].target_modules) == sorted(TARGETS)


def test_a_bias_of_B_and_norms_of_dora_go_with_their_rows(tmp_path: Path) -> None:
    A, B = next(iter(pairs(WHOLE).values()))
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
    bias = torch.arange(16, dtype=torch.float64) / 7
    tensors = {f"{name}A.weight": A, f"{name}B.weight": B, f"{name}B.bias": bias}
    config = peft_config("qkv_proj", layers_to_transform=[1], lora_bias=True)
    expected = by_hand(Model(), {})
    for part, rows, b in zip(
        ("q_proj", "k_proj", "v_proj"), (3 * B @ A).split([8, 4, 4]), bias.split([8, 4, 4]), strict=True
    ):
        layer = expected.model.layers[1].self_attn.get_submodule(part)
        layer.weight.data += rows
        layer.bias.data += 3 * b
    assert_loads(Model(), write(tmp_path / "bias", tensors, config), expected)

    norms = torch.rand(16, dtype=torch.float64) + 1
    tensors = {f"{name}A.weight": A, f"{name}B.weight": B, f"{name}magnitude_vector": norms}
    config = peft_config("qkv_proj", layers_to_transform=[1], use_dora=True)
    expected = by_hand(Model(), {})
    for part, rows, m in zip(
        ("q_proj", "k_proj", "v_proj"), (3 * B @ A).split([8, 4, 4]), norms.split([8, 4, 4]), strict=True
    ):
        layer = expected.model.layers[1].self_attn.get_submodule(part)
        moved = layer.weight.data + rows
        layer.weight.data = m[:, None] * moved / moved.norm(dim=1, keepdim=True)
    assert_loads(Model(), write(tmp_path / "dora", tensors, config), expected)


@pytest.mark.parametrize(
    ("fused", "names"),
    [
        ("W_pack", ("q_proj", "k_proj", "v_proj")),
        ("Wqkv", ("q_proj", "k_proj", "v_proj")),
        ("c_attn", ("q_proj", "k_proj", "v_proj")),
        ("qkv", ("query", "key", "value")),
        ("qkv", ("wq", "wk", "wv")),
        ("to_qkv", ("to_q", "to_k", "to_v")),
    ],
)
def test_fused_layers_are_known_by_the_names_models_have_for_them(
    tmp_path: Path, fused: str, names: tuple[str, str, str]
) -> None:
    A, B = next(iter(pairs(WHOLE).values()))
    place = "model.layers.0.self_attn"
    base = Model(names=(*names, fused))
    parts = dict(zip(names, (3 * B @ A).split([8, 4, 4]), strict=True))
    folder = write(tmp_path, peft_file({f"{place}.{fused}": (A, B)}), peft_config(fused))
    assert_loads(base, folder, by_hand(base, {f"{place}.{name}": rows for name, rows in parts.items()}))


@pytest.mark.parametrize("fused", ["query_key_value", "wqkv"])
def test_rows_that_go_head_by_head_are_refused(tmp_path: Path, fused: str) -> None:
    A, B = next(iter(pairs(WHOLE).values()))
    folder = write(tmp_path, peft_file({f"model.layers.0.self_attn.{fused}": (A, B)}), peft_config(fused))
    base = Model()
    with refused(base, CheckpointError, f"{fused} holds the rows of q_proj, k_proj, v_proj head by head"):
        PeftModel.from_pretrained(base, folder)


def test_codegens_groups_of_heads_are_refused(tmp_path: Path) -> None:
    """Its ``attn.qkv_proj`` has queries, values and keys in four groups; elsewhere the name means rows in order."""
    A, B = next(iter(pairs(WHOLE).values()))
    base = nn.Sequential()
    base.add_module("attn", Model().model.layers[0].self_attn)
    folder = write(tmp_path / "split", peft_file({"attn.qkv_proj": (A, B)}), peft_config("qkv_proj"))
    with refused(base, CheckpointError, "attn.qkv_proj holds the rows of q_proj, k_proj, v_proj head by head"):
        PeftModel.from_pretrained(base, folder)
    base = nn.Sequential()
    base.add_module("attn", Model(fused=True).model.layers[0].self_attn)
    folder = write(tmp_path / "fused", peft_file({"attn.q_proj": (A, B[:8])}), peft_config("q_proj"))
    with refused(base, CheckpointError, "attn.q_proj is a part of attn.qkv_proj in this model, which holds the rows"):
        PeftModel.from_pretrained(base, folder)


def test_a_fused_layer_of_other_sizes_is_refused(tmp_path: Path) -> None:
    A, B = next(iter(pairs({"self_attn.qkv_proj": (18, WIDTH)}).values()))
    folder = write(tmp_path, peft_file({"model.layers.0.self_attn.qkv_proj": (A, B)}), peft_config("qkv_proj"))
    base = Model()
    with refused(base, CheckpointError, r"B \(18, 2\), and the layers .* have \[8, 4, 4\] rows and 8 columns"):
        PeftModel.from_pretrained(base, folder)


def test_tensors_whose_rows_nobody_knows_are_refused(tmp_path: Path) -> None:
    A, B = next(iter(pairs(WHOLE).values()))
    name = "model.layers.0.self_attn.qkv_proj"
    tensors = peft_file({name: (A, B)}) | {f"base_model.model.{name}.lora_diag": torch.ones(2, dtype=torch.float64)}
    folder = write(tmp_path, tensors, peft_config("qkv_proj", init_lora_weights="kasa"))
    base = Model()
    with refused(base, CheckpointError, "has lora_diag beside A and B, and cutting a layer into its parts would"):
        PeftModel.from_pretrained(base, folder)


def test_a_start_that_moved_the_base_is_refused(tmp_path: Path) -> None:
    A, B = next(iter(pairs(WHOLE).values()))
    file = peft_file({"model.layers.0.self_attn.qkv_proj": (A, B)})
    folder = write(tmp_path, file, peft_config("qkv_proj", init_lora_weights="pissa"))
    base = Model()
    with refused(base, CheckpointError, "init_lora_weights='pissa' took something out of the weights of those it was"):
        PeftModel.from_pretrained(base, folder)


def test_our_own_file_of_such_a_start_holds_plain_lora_and_loads(tmp_path: Path) -> None:
    trained = lorafa.get_peft_model(
        Model(fused=True), LoraConfig(r=2, target_modules=["qkv_proj"], init_lora_weights="pissa")
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    trained.save_pretrained(tmp_path)
    merged = trained.merge_and_unload()
    base = Model(fused=True)
    expected = {}
    for block in range(2):
        name = f"model.layers.{block}.self_attn.qkv_proj.weight"
        update = (merged.get_parameter(name) - base.get_parameter(name)).detach()
        for part, rows in zip(PARTS, update.split(SIZES), strict=True):
            expected[f"model.layers.{block}.self_attn.{part}"] = rows
    assert_loads(Model(), tmp_path, by_hand(Model(), expected))


# ---- fused in the model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 3, "up_proj": 1}}])
def test_parts_become_the_fused_layer(tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks = settings.get("rank_pattern", {})
    factors = {}
    for name, (out, in_) in LAYERS.items():
        factors |= pairs({name: (out, in_)}, ranks.get(name.rpartition(".")[2], 2))
    power = 0.5 if settings.get("use_rslora") else 1
    single = {name: 6 / len(A) ** power * B @ A for name, (A, B) in factors.items()}
    folder = write(tmp_path, peft_file(factors), peft_config(*TARGETS, **settings))
    model = assert_loads(Model(fused=True), folder, by_hand(Model(fused=True), fused_updates(single)))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj")
    assert len(model.peft_config["default"].rank_pattern) <= 4
    assert layer.r["default"] == 4 + ranks.get("k_proj", 2)


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("k_proj",), ("q_proj",), ("v_proj", "up_proj"), ("gate_proj",)]
)
def test_parts_without_an_adapter_have_rows_of_zeros(tmp_path: Path, targets: tuple[str, ...]) -> None:
    factors = pairs({name: shape for name, shape in LAYERS.items() if name.endswith(targets)})
    expected = fused_updates(updates(factors, 3.0))
    folder = write(tmp_path, peft_file(factors), peft_config(*targets))
    assert_loads(Model(fused=True), folder, by_hand(Model(fused=True), expected))


def test_parts_that_a_file_has_lost_are_named(tmp_path: Path) -> None:
    factors = pairs()
    del factors["model.layers.1.self_attn.k_proj"]
    folder, base = write(tmp_path, peft_file(factors), peft_config(*TARGETS)), Model(fused=True)
    with refused(base, CheckpointError, "has no tensors of model.layers.1.self_attn.k_proj, which target_modules of"):
        PeftModel.from_pretrained(base, folder)
    without = {name: pair for name, pair in pairs().items() if name != "model.layers.0.mlp.down_proj"}
    folder = write(tmp_path, peft_file(without), peft_config(*TARGETS))
    with refused(base, CheckpointError, "has no tensors of model.layers.0.mlp.down_proj, which target_modules of"):
        PeftModel.from_pretrained(base, folder)
    config = peft_config(*TARGETS, exclude_modules=["1.self_attn.k_proj"])
    expected = by_hand(Model(fused=True), fused_updates(updates(factors, 3.0)))
    assert_loads(Model(fused=True), write(tmp_path, peft_file(factors), config), expected)


def test_norms_and_biases_of_all_parts_are_joined(tmp_path: Path) -> None:
    factors = pairs({name: shape for name, shape in LAYERS.items() if "self_attn" in name})
    tensors = peft_file(factors)
    generator = torch.Generator().manual_seed(4)
    norms = {n: torch.rand(len(B), dtype=torch.float64, generator=generator) + 1 for n, (_, B) in factors.items()}
    with_norms = tensors | {f"base_model.model.{n}.lora_magnitude_vector": m for n, m in norms.items()}
    with_bias = tensors | {f"base_model.model.{n}.lora_B.bias": m for n, m in norms.items() if "k_proj" in n}
    with_bias |= {k.replace("B.weight", "B.bias"): torch.zeros(len(t), dtype=torch.float64)
                  for k, t in tensors.items() if "lora_B" in k and "k_proj" not in k}  # fmt: skip
    dora, plain = Model(fused=True), Model(fused=True)
    for block in range(2):
        place = f"model.layers.{block}.self_attn"
        rows = fused_updates(updates(factors, 3.0))[f"{place}.qkv_proj"]
        layer = dora.get_submodule(f"{place}.qkv_proj")
        moved = layer.weight.data + rows
        m = torch.cat([norms[f"{place}.{part}"] for part in ("q_proj", "k_proj", "v_proj")])
        layer.weight.data = m[:, None] * moved / moved.norm(dim=1, keepdim=True)
        layer = plain.get_submodule(f"{place}.qkv_proj")
        layer.weight.data += rows
        layer.bias.data[8:12] += 3 * norms[f"{place}.k_proj"]
    names = ("q_proj", "k_proj", "v_proj")
    assert_loads(Model(fused=True), write(tmp_path / "d", with_norms, peft_config(*names, use_dora=True)), dora)
    assert_loads(Model(fused=True), write(tmp_path / "b", with_bias, peft_config(*names, lora_bias=True)), plain)


def test_norms_of_some_parts_alone_are_refused(tmp_path: Path) -> None:
    factors = pairs({"self_attn.q_proj": (8, WIDTH)})
    tensors = peft_file(factors)
    tensors |= {f"base_model.model.{n}.lora_magnitude_vector": torch.ones(8, dtype=torch.float64) for n in factors}
    folder = write(tmp_path, tensors, peft_config("q_proj", use_dora=True))
    base = Model(fused=True)
    with refused(base, CheckpointError, "the file has none for the rows of k_proj, v_proj"):
        PeftModel.from_pretrained(base, folder)


def test_parts_that_are_not_those_of_the_fused_layer_are_refused(tmp_path: Path) -> None:
    factors = pairs({"self_attn.q_proj": (8, WIDTH), "self_attn.k_proj": (5, WIDTH), "self_attn.v_proj": (4, WIDTH)})
    folder = write(tmp_path, peft_file(factors), peft_config("q_proj", "k_proj", "v_proj"))
    base = Model(fused=True)
    with refused(base, CheckpointError, r"which has 16 rows and 8 columns, and theirs are \[8, 5, 4\] and \[8\]"):
        PeftModel.from_pretrained(base, folder)


def test_a_layer_whose_rows_go_head_by_head_takes_no_parts(tmp_path: Path) -> None:
    names = ("q_proj", "k_proj", "v_proj", "query_key_value")
    factors = pairs({"self_attn.q_proj": (8, WIDTH)})
    folder = write(tmp_path, peft_file(factors), peft_config("q_proj"))
    base = Model(fused=True, names=names)
    with refused(base, CheckpointError, "which holds the rows of its parts head by head"):
        PeftModel.from_pretrained(base, folder)


def test_what_was_converted_is_trained_on(tmp_path: Path) -> None:
    factors = pairs()
    folder = write(tmp_path, peft_file(factors), peft_config(*TARGETS))
    model = PeftModel.from_pretrained(Model(fused=True), folder, is_trainable=True)
    model(IDS).pow(2).mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(bool(grad.abs().sum() > 0) for grad in trained.values())  # type: ignore[union-attr]


def test_an_adapter_beside_others_is_converted_too(tmp_path: Path) -> None:
    factors = pairs()
    folder = write(tmp_path, peft_file(factors), peft_config(*TARGETS))
    model = lorafa.get_peft_model(Model(fused=True), LoraConfig(r=2, target_modules=["qkv_proj"]))
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    with torch.no_grad():
        expected = by_hand(Model(fused=True), fused_updates(updates(factors, 3.0)))
        torch.testing.assert_close(model(IDS), expected(IDS))
