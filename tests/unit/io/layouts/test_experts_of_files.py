"""Experts one by one, as in files of transformers 4, on stacks of transformers 5, and the other way round."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorafa
from lorafa import LoraConfig, PeftModel
from lorafa.errors import CheckpointError, TargetError
from toys.compare import close, refused
from toys.language_models import logits, mixtral, qwen2_moe
from toys.layouts import by_hand, pair, peft_config, peft_file, write

WIDTH, EXPERTS, LAYERS = 16, 3, 2
OF_EXPERTS = r".*\.experts\.\d+\.\w+"
OLD = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 20),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 12),
}
"""Of each architecture in transformers 4: where its experts are, gate, up and down, and the width inside one."""
MODELS = {"mixtral": mixtral, "qwen2_moe": qwen2_moe}


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().double().eval()


def single_experts(
    kind: str, parts: tuple[int, ...] = (0, 1, 2), rank: int = 2, experts: tuple[int, ...] = (0, 1, 2)
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of an expert's layers, by the names of transformers 4; ``parts`` picks of gate, up, down."""
    block, names, inner = OLD[kind]
    factors = {}
    for layer in range(LAYERS):
        for expert in experts:
            for part in parts:
                out, in_ = (inner, WIDTH) if part < 2 else (WIDTH, inner)
                name = f"model.layers.{layer}.{block}.experts.{expert}.{names[part]}"
                factors[name] = pair(out, in_, rank, seed=100 * layer + 10 * expert + part)
    return factors


def stacked_updates(
    kind: str, factors: dict[str, tuple[Tensor, Tensor]], scaling: float | dict[str, float]
) -> dict[str, Tensor]:
    """What single experts' updates are for the stacks of transformers 5; zeros where there is none."""
    block, names, inner = OLD[kind]
    found = {}
    for layer in range(LAYERS):

        def update(expert: int, part: int, layer: int = layer) -> Tensor:
            shape = (inner, WIDTH) if part < 2 else (WIDTH, inner)
            name = f"model.layers.{layer}.{block}.experts.{expert}.{names[part]}"
            if name not in factors:
                return torch.zeros(shape, dtype=torch.float64)
            A, B = factors[name]
            return (scaling if isinstance(scaling, float) else scaling[name]) * B @ A

        place = f"model.layers.{layer}.mlp.experts"
        both = [torch.cat([update(e, 0), update(e, 1)]) for e in range(EXPERTS)]
        found[f"{place}.gate_up_proj"] = torch.stack(both)
        found[f"{place}.down_proj"] = torch.stack([update(e, 2) for e in range(EXPERTS)])
    return found


def assert_gives(model: nn.Module, expected: nn.Module) -> None:
    with torch.no_grad():
        close(logits(model.eval()), logits(expected.eval()), 1e-9)


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["", "rslora"])
def test_single_experts_on_stacks(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    factors = single_experts(kind)
    config = peft_config(**settings) | {"target_modules": OF_EXPERTS}
    folder = write(tmp_path, peft_file(factors), config)
    expected = by_hand(base(kind), stacked_updates(kind, factors, 6 / 2**0.5 if settings else 3.0))
    model = PeftModel.from_pretrained(base(kind), folder)
    assert_gives(model, expected)
    model.save_pretrained(tmp_path / "again")
    assert_gives(PeftModel.from_pretrained(base(kind), tmp_path / "again"), expected)


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (0, 2)])
def test_layers_of_experts_without_an_adapter_have_zeros(tmp_path: Path, kind: str, parts: tuple[int, ...]) -> None:
    factors = single_experts(kind, parts)
    names = "|".join(OLD[kind][1][part] for part in parts)
    config = peft_config() | {"target_modules": rf".*\.experts\.\d+\.({names})"}
    folder = write(tmp_path, peft_file(factors), config)
    expected = by_hand(base(kind), stacked_updates(kind, factors, 3.0))
    assert_gives(PeftModel.from_pretrained(base(kind), folder), expected)


def test_experts_of_other_ranks_and_alphas_and_some_without(tmp_path: Path) -> None:
    factors = single_experts("qwen2_moe", experts=(0,)) | single_experts("qwen2_moe", rank=3, experts=(2,))
    scaling = {name: (6 / 2 if ".experts.0." in name else 5 / 3) for name in factors}
    config = peft_config(rank_pattern={r"experts\.2\..*": 3}) | {"target_modules": r".*experts\.(0|2)\..*_proj"}
    config["alpha_pattern"] = {r"experts\.2\..*": 5}
    folder = write(tmp_path, peft_file(factors), config)
    expected = by_hand(base("qwen2_moe"), stacked_updates("qwen2_moe", factors, scaling))
    assert_gives(PeftModel.from_pretrained(base("qwen2_moe"), folder), expected)


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], r".*\.w\d", ["experts.1.w1", "w3", "w2"]])
def test_experts_that_a_file_has_lost_are_named(tmp_path: Path, targets: list[str] | str) -> None:
    factors = single_experts("mixtral")
    del factors["model.layers.1.block_sparse_moe.experts.1.w1"]
    folder = write(tmp_path, peft_file(factors), peft_config() | {"target_modules": targets})
    model = base("mixtral")
    with refused(
        model, CheckpointError, r"no tensors of model.layers.1.block_sparse_moe.experts.1.w1, which target_mod"
    ):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("kind", OLD)
def test_attention_and_router_go_with_them(tmp_path: Path, kind: str) -> None:
    factors = single_experts(kind)
    updates = stacked_updates(kind, factors, 3.0)
    for layer in range(LAYERS):
        q, gate = pair(16, WIDTH, 2, layer), pair(EXPERTS, WIDTH, 2, layer)
        factors[f"model.layers.{layer}.self_attn.q_proj"] = q
        factors[f"model.layers.{layer}.{OLD[kind][0]}.gate"] = gate
        updates[f"model.layers.{layer}.self_attn.q_proj"] = 3.0 * q[1] @ q[0]
        updates[f"model.layers.{layer}.mlp.gate"] = 3.0 * gate[1] @ gate[0]
    config = peft_config() | {"target_modules": rf"{OF_EXPERTS}|.*\.(q_proj|gate)"}
    folder = write(tmp_path, peft_file(factors), config)
    assert_gives(PeftModel.from_pretrained(base(kind), folder), by_hand(base(kind), updates))


@pytest.mark.parametrize("kind", OLD)
def test_a_router_alone_is_a_bare_weight(tmp_path: Path, kind: str) -> None:
    factors, updates = {}, {}
    for layer in range(LAYERS):
        gate = pair(EXPERTS, WIDTH, 2, layer)
        factors[f"model.layers.{layer}.{OLD[kind][0]}.gate"] = gate
        updates[f"model.layers.{layer}.mlp.gate"] = 3.0 * gate[1] @ gate[0]
    folder = write(tmp_path, peft_file(factors), peft_config("gate"))
    assert_gives(PeftModel.from_pretrained(base(kind), folder), by_hand(base(kind), updates))


class OwnLinear(nn.Module):
    """A layer of someone else, of which nobody knows how it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_bare_weight_of_an_unknown_layer_is_no_router(tmp_path: Path) -> None:
    folder, model = write(tmp_path, peft_file({"0": pair(4, 4)}), peft_config("0")), nn.Sequential(OwnLinear())
    with refused(model, TargetError, "'0' is a OwnLinear, which cannot carry an adapter"):
        PeftModel.from_pretrained(model, folder)


def test_what_was_brought_to_other_layers_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, peft_file(single_experts("mixtral")), peft_config("w1", "w2", "w3"))
    text = r"changes nothing it computes: single experts for stacked ones \(model.layers.*\). save_pretrained writes it"
    with pytest.warns(UserWarning, match=text):
        model = PeftModel.from_pretrained(base("mixtral"), folder)
    model.save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(base("mixtral"), tmp_path / "new")


def test_dropout_that_cannot_act_on_stacks_is_said(tmp_path: Path) -> None:
    factors = single_experts("mixtral")
    folder = write(tmp_path, peft_file(factors), peft_config("w1", "w2", "w3", lora_dropout=0.1))
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 is taken as 0: .* bare parameters of this model"):
        model = PeftModel.from_pretrained(base("mixtral"), folder)
    assert_gives(model, by_hand(base("mixtral"), stacked_updates("mixtral", factors, 3.0)))


def test_stacks_of_mlx(tmp_path: Path) -> None:
    """``LoRASwitchLinear``: lora_a (E, r, in), lora_b (E, out, r), of ``switch_mlp`` where transformers has experts."""
    factors = single_experts("mixtral")
    tensors = {}
    for layer in range(LAYERS):
        for ours, theirs in zip(("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"), strict=True):
            place = f"model.layers.{layer}.block_sparse_moe"
            of_all = [factors[f"{place}.experts.{e}.{ours}"] for e in range(EXPERTS)]
            tensors[f"{place}.switch_mlp.{theirs}.lora_a"] = torch.stack([A for A, _ in of_all])
            tensors[f"{place}.switch_mlp.{theirs}.lora_b"] = torch.stack([B for _, B in of_all])
    numbers = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    folder = write(tmp_path, tensors, {"fine_tune_type": "lora", "lora_parameters": numbers}, "adapters.safetensors")
    expected = by_hand(base("mixtral"), stacked_updates("mixtral", factors, 3.0))
    assert_gives(PeftModel.from_pretrained(base("mixtral"), folder), expected)


@pytest.mark.parametrize(
    ("extra", "settings", "text"),
    [
        ({"lora_magnitude_vector": torch.ones(20)}, {"use_dora": True}, "has lora_magnitude_vector beside A and B"),
        ({"lora_B.bias": torch.ones(20)}, {"lora_bias": True}, "has lora_B.bias beside A and B, and stacking experts"),
    ],
)
def test_what_stacks_cannot_hold_is_refused(
    tmp_path: Path, extra: dict[str, Tensor], settings: dict[str, Any], text: str
) -> None:
    tensors = peft_file(single_experts("mixtral"))
    place = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    tensors |= {f"{place}.{key}": tensor for key, tensor in extra.items()}
    folder, model = write(tmp_path, tensors, peft_config("w1", "w2", "w3", **settings)), base("mixtral")
    with refused(model, CheckpointError, text):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("experts.7.w1", (20, WIDTH), "experts.7.w1 has A .* has 3 experts of 20 rows and 16 columns"),
        ("experts.0.w1", (21, WIDTH), "and B \\(21, 2\\), and .* of 20 rows"),
        ("experts.0.w1", (20, 15), "has A \\(2, 15\\)"),
    ],
)
def test_experts_that_do_not_fit_are_refused(tmp_path: Path, name: str, shape: tuple[int, int], text: str) -> None:
    factors = single_experts("mixtral") | {f"model.layers.0.block_sparse_moe.{name}": pair(*shape)}
    folder, model = write(tmp_path, peft_file(factors), peft_config("w1", "w2", "w3")), base("mixtral")
    with refused(model, CheckpointError, text):
        PeftModel.from_pretrained(model, folder)


def test_a_stack_of_gate_and_up_in_turns_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, peft_file(single_experts("mixtral")), peft_config("w1", "w2", "w3"))
    model = base("mixtral")
    for layer in range(LAYERS):
        model.get_submodule(f"model.layers.{layer}.mlp.experts").is_concatenated = False  # type: ignore[assignment]
    with refused(model, CheckpointError, "holds the rows of gate and up in turns"):
        PeftModel.from_pretrained(model, folder)


# ---- the other way round


class Expert(nn.Module):
    """One expert of transformers 4."""

    def __init__(self, names: tuple[str, str, str], inner: int) -> None:
        super().__init__()
        self.names = names
        for name, (out, in_) in zip(names, ((inner, WIDTH), (inner, WIDTH), (WIDTH, inner)), strict=True):
            self.add_module(name, nn.Linear(in_, out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class Mixture(nn.Module):
    """The block of transformers 4 with the weights of that of transformers 5."""

    def __init__(self, block: nn.Module, names: tuple[str, str, str], inner: int) -> None:
        super().__init__()
        stack: Any = block.experts
        self.inner = block
        self.experts = nn.ModuleList(Expert(names, inner).double() for _ in range(EXPERTS))
        for i, expert in enumerate(self.experts):
            both = stack.gate_up_proj.detach()[i].chunk(2)
            for name, weight in zip(names, (*both, stack.down_proj.detach()[i]), strict=True):
                expert.get_submodule(name).weight.data = weight.clone()
        del block.experts

    def forward(self, x: Tensor) -> Tensor:
        gate: Any = self.inner.gate
        flat = x.reshape(-1, x.shape[-1])
        _, weights, chosen = gate(flat)
        shares = torch.zeros(len(flat), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights.to(x.dtype))
        y = sum(shares[:, i : i + 1] * expert(flat) for i, expert in enumerate(self.experts))
        return y.view_as(x)


def older(kind: str) -> nn.Module:
    """The model with single experts where transformers 4 has them."""
    model: Any = base(kind)
    block, names, inner = OLD[kind]
    for layer in model.model.layers:
        setattr(layer, block, Mixture(layer.mlp, names, inner))
        if block != "mlp":
            layer.mlp = getattr(layer, block)  # its forward calls it so
    return model


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
def test_stacks_on_single_experts(tmp_path: Path, targets: list[str]) -> None:
    kind = "mixtral"
    new = base(kind)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=[f"experts.{name}" for name in targets])
    trained = lorafa.get_peft_model(new, config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trained.save_pretrained(tmp_path)
    with torch.no_grad():
        close(logits(older(kind)), logits(base(kind)), 1e-9)
    assert_gives(PeftModel.from_pretrained(older(kind), tmp_path), trained)
    assert transformers.__version__ >= "5"


def test_stacks_whose_parameters_are_not_named_are_refused(tmp_path: Path) -> None:
    A, B = torch.zeros(2 * EXPERTS, WIDTH), torch.zeros(40, 2 * EXPERTS)
    tensors = peft_file({"model.layers.0.mlp.experts": (A, B)})
    folder, model = write(tmp_path, tensors, peft_config("q_proj")), older("mixtral")
    with refused(model, CheckpointError, r"adapters of 1 parameters of .*experts, and target_parameters=\[\] of its"):
        PeftModel.from_pretrained(model, folder)
