"""Adapters on disk beside their bases, and the rules by which other programs read what is exported of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.surgery.walk import lora_layers
from toys.adapters import initializer_of, stats_for, train
from toys.language_models import llama


def on_disk(
    folder: Path, base: nn.Module | None = None, *, size: float = 0.1, **settings: Any
) -> tuple[PeftModel, str]:
    """A trained adapter on all linear layers, and the folder it is saved in, which names that of its base."""
    base = llama() if base is None else base
    base.save_pretrained(folder / "base")  # type: ignore[operator]
    base.name_or_path = str(folder / "base")  # type: ignore[assignment]
    usual = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(**(usual | settings))
    stats = None
    if initializer_of(config.init_lora_weights).needs:
        kinds = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        stats = {name: stats_for(module.weight) for name, module in kinds.items() if not name.endswith("lm_head")}
    model = get_peft_model(base, config, stats=stats)
    train(model, size)
    model.save_pretrained(folder / "adapter")
    return model.eval(), str(folder / "adapter")


@torch.no_grad()
def updates_of(model: PeftModel) -> dict[str, Tensor]:
    """The update of each layer as a matrix (out, in), by its path."""
    layers = lora_layers(model.get_base_model())
    return {path: layer.adapters["default"].delta_weight(layer.base_weight()) for path, layer in layers}


def by_vllm(folder: Path, *, rank_limit: int = 512) -> dict[str, Tensor]:
    """Updates by vLLM's rule: one r and one alpha for all layers, rsLoRA known, patterns not."""
    config, tensors = _files(folder)
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert 0 < config["r"] <= rank_limit
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        if parts[-1] == "weight":
            assert parts[-2] in ("lora_A", "lora_B"), f"{key} is unsupported LoRA weight"
            found.setdefault(".".join(parts[2:-2]), {})[parts[-2][-1]] = tensor
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B"), f"{key} is unsupported LoRA weight"
            found.setdefault(".".join(parts[2:-1]), {})[parts[-1][-1]] = tensor
    return {name: scaling * (pair["B"].float() @ pair["A"].float()) for name, pair in found.items()}


def by_sglang(folder: Path) -> dict[str, Tensor]:
    """Updates by SGLang's rule: alpha / r whatever use_rslora says, buffers of r rows, layers that a list names."""
    config, tensors = _files(folder)
    assert isinstance(config["target_modules"], list)
    wanted = {name.rpartition(".")[2] for name in config["target_modules"]}
    found = {}
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            assert A.shape[0] == B.shape[1] == config["r"]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if name.rpartition(".")[2] in wanted:  # others it passes over
                found[name] = config["lora_alpha"] / config["r"] * (B.float() @ A.float())
    return found


def by_llama_cpp(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Updates of the base's tensors (rows in llama.cpp's order) by its rule, and the fields of the file."""
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    tensors = {tensor.name: (torch.from_numpy(tensor.data.copy()), list(tensor.shape)) for tensor in reader.tensors}
    found = {}
    for name in [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]:
        (A, a_shape), (B, b_shape) = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        alpha, rank = fields["adapter.lora.alpha"], b_shape[0]  # ggml lists the fastest dimension first
        scale = alpha / rank if alpha else 1.0
        if name == "token_embd.weight":  # rows of A are looked up
            assert a_shape[0] == rank
            found[name] = scale * (B @ A.T)
        else:
            assert a_shape[1] == rank
            found[name] = scale * (B @ A)
    return found, fields


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    return config, load_file(folder / "adapter_model.safetensors")
