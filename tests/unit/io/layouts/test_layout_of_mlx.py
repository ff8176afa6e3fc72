"""Files of mlx_lm.lora: transposed factors, a scale for an alpha, DoRA, embeddings, stacks of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import PeftModel
from lorafa.errors import CheckpointError, ConfigError
from toys.compare import refused
from toys.layouts import INNER, WIDTH, Model, assert_loads, by_hand, pairs, peft_config, updates, write

FILE = "adapters.safetensors"


def config(**settings: Any) -> dict[str, Any]:
    """As mlx_lm.lora writes it, shortened."""
    numbers = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": None}
    return {
        "fine_tune_type": "lora", "num_layers": 16, "model": "x", "lora_parameters": numbers | settings.pop("lora", {}),
    } | settings  # fmt: skip


def mlx_file(factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A.T, B.T
    return tensors


def test_linear_layers(tmp_path: Path) -> None:
    factors = pairs()
    folder = write(tmp_path, mlx_file(factors), config(lora={"dropout": 0.1}), FILE)
    model = assert_loads(Model(), folder, by_hand(Model(), updates(factors, 20.0)))
    made = model.peft_config["default"]
    assert (made.r, made.lora_alpha, made.lora_dropout) == (2, 40, 0.1)


def test_dora(tmp_path: Path) -> None:
    factors, base = pairs({"self_attn.q_proj": (8, WIDTH)}), Model()
    tensors, expected = mlx_file(factors), {}
    for i, (name, (A, B)) in enumerate(factors.items()):
        norms = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) + 1
        tensors[f"{name}.m"] = norms
        weight = base.get_parameter(f"{name}.weight").detach()
        moved = weight + 20.0 * B @ A
        expected[name] = norms[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    folder = write(tmp_path, tensors, config(fine_tune_type="dora"), FILE)
    assert_loads(Model(), folder, by_hand(base, expected))


def test_dora_without_norms_is_refused(tmp_path: Path) -> None:
    folder, base = write(tmp_path, mlx_file(pairs()), config(fine_tune_type="dora"), FILE), Model()
    with refused(base, CheckpointError, "says fine_tune_type='dora', and model.layers.0.*, .* no norms m"):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("by_path", [False, True])
def test_a_file_of_an_earlier_step_is_read_with_the_config_beside_it(tmp_path: Path, by_path: bool) -> None:
    factors, name = pairs(), f"0000100_{FILE}"
    folder = write(tmp_path, mlx_file(factors), config(), name)
    expected = by_hand(Model(), updates(factors, 20.0))
    if by_path:
        assert_loads(Model(), folder / name, expected)
    else:
        assert_loads(Model(), folder, expected, weight_name=name)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_act_on_a_tied_head_too(tmp_path: Path, tied: bool) -> None:
    """``LoRAEmbedding.as_linear`` of MLX adds the update to the logits of a tied model."""
    a, b = torch.randn(11, 2, dtype=torch.float64), torch.randn(2, WIDTH, dtype=torch.float64)
    name = "model.embed_tokens"
    folder = write(tmp_path, {f"{name}.lora_a": a, f"{name}.lora_b": b}, config(), FILE)
    assert_loads(Model(tied=tied), folder, by_hand(Model(tied=tied), {name: 20.0 * a @ b}))


def test_an_embedding_with_dora_is_refused(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    a, b, m = torch.randn(11, 2), torch.randn(2, WIDTH), torch.ones(11)
    folder = write(tmp_path, {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m}, config(), FILE)
    base = Model()
    with refused(base, CheckpointError, "MLX has a norm for each token, and PEFT's DoRA one for each dimension"):
        PeftModel.from_pretrained(base, folder)


def test_fused_layers_of_mlx_models_are_cut_as_any_others(tmp_path: Path) -> None:
    factors = pairs({"mlp.gate_up_proj": (2 * INNER, WIDTH)})
    expected = {}
    for name, update in updates(factors, 20.0).items():
        owner = name.rpartition(".")[0]
        expected |= dict(zip((f"{owner}.gate_proj", f"{owner}.up_proj"), update.chunk(2), strict=True))
    folder = write(tmp_path, mlx_file(factors), config(), FILE)
    assert_loads(Model(), folder, by_hand(Model(), expected))


@pytest.mark.parametrize(
    ("tensors", "settings", "kind", "text"),
    [
        ({}, {"fine_tune_type": "full"}, CheckpointError, "fine_tune_type='full', and it holds whole weights"),
        ({}, {"lora": {"scale": None}}, ConfigError, r"have rank=2, scale=None and dropout=0.0. A whole number"),
        ({}, {"lora_parameters": None}, ConfigError, "has no lora_parameters, which say rank and scale"),
        ({"model.norm.weight": torch.ones(3)}, {}, CheckpointError, r"would be ignored: model.norm.weight"),
        ({"x.lora_a_scales": torch.ones(3)}, {}, CheckpointError, "A and B are quantized"),
        ({"model.y.lora_a": torch.ones(3, 2)}, {}, CheckpointError, "model.y has no lora_b"),
    ],
)
def test_what_is_no_adapter_of_mlx_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    folder = write(tmp_path, mlx_file(pairs()) | tensors, config(**settings), FILE)
    base = Model()
    with refused(base, kind, text):  # type: ignore[arg-type]
        PeftModel.from_pretrained(base, folder)


def test_a_config_of_peft_beside_tensors_of_mlx_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, mlx_file(pairs()), peft_config("q_proj"), FILE)
    base = Model()
    with refused(base, CheckpointError, r"may be in two layouts: it has the marks of MLX .* and PEFT"):
        PeftModel.from_pretrained(base, folder)
