"""MLX's layout: ``adapters.safetensors`` of ``mlx_lm.lora``, with an ``adapter_config.json`` of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError, shorten
from lorafa.io.layouts.base import NORMS, TABLE_A, TABLE_B, A, B, Contents, Factors, Layout, Raw, tidy
from lorafa.io.layouts.names import BaseNames
from lorafa.settings.checks import is_int

_PARTS = ("lora_a", "lora_b", "m")
_SWITCH = ".switch_mlp."
"""Where MLX keeps the stacked experts that transformers calls ``.experts.``."""


class MlxLayout(Layout):
    """y + scale (x a) b, with a (in, r) and b (r, out): transposed to PEFT's, and no alpha but the scale itself.

    Read from ``mlx_lm/tuner/{lora,dora,utils}.py``. Embeddings have a (vocab, r), stacks of experts a (E, r, in) and
    b (E, out, r), DoRA its norms ``m`` (out,).
    """

    written_by = "MLX (mlx_lm.lora)"
    weights = ("adapters.safetensors",)

    def detect(self, raw: Raw) -> str | None:
        return next((key for key in raw.tensors if key.rpartition(".")[2] in ("lora_a", "lora_b")), None)

    def read(self, raw: Raw, base: BaseNames) -> Contents:
        rank, scale, dropout = _numbers(raw)
        layers = _layers(raw)
        factors: dict[str, Factors] = {}
        alpha = tidy(scale * rank)
        tied = []
        for name, parts in layers.items():
            placed = _placed(raw, name, parts, base)
            factors |= {place: Factors(tensors, rank, alpha) for place, tensors in placed.items()}
            if TABLE_A in placed.get(name, {}):  # a table multiplies the hidden state too where it is tied to the head
                turned = {A: placed[name][TABLE_B].T, B: placed[name][TABLE_A].T}
                others = base.tied.get(base.home(name) or "", [])
                factors |= {other: Factors(turned, rank, alpha) for other in others}
                tied += others
        lacking = [name for name, parts in layers.items() if "m" not in parts]
        if raw.values.get("fine_tune_type") == "dora" and lacking:
            raise CheckpointError(
                f"{raw.path}: its config says fine_tune_type='dora', and {shorten(lacking, 3)} have no norms m. "
                "Nothing was loaded."
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=sorted(factors),
            lora_dropout=dropout,
            use_dora=any(NORMS in one.tensors for one in factors.values()),
            ensure_weight_tying=bool(tied),
            inference_mode=True,
        )
        return Contents(raw.path, config, factors, {})


def _numbers(raw: Raw) -> tuple[int, float, float]:
    """(rank, scale, dropout) of the config."""
    given: Any = raw.values.get("lora_parameters")
    if raw.values.get("fine_tune_type") == "full":
        raise CheckpointError(
            f"{raw.path} is no adapter: MLX wrote it with fine_tune_type='full', and it holds whole weights. "
            "Make a model of it with mlx_lm.fuse and load that. Nothing was loaded."
        )
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{raw.path} has tensors as MLX writes them, and its adapter_config.json has no lora_parameters, which say "
            "rank and scale. Nothing was loaded."
        )
    rank: Any = given.get("rank")
    scale: Any = given.get("scale")
    dropout: Any = given.get("dropout", 0.0)
    numbers = is_int(rank) and isinstance(scale, (int, float)) and isinstance(dropout, (int, float))
    if not numbers or not scale > 0:
        raise ConfigError(
            f"{raw.path}: lora_parameters of its adapter_config.json have rank={rank!r}, scale={scale!r} and "
            f"dropout={dropout!r}. A whole number, a number > 0 and a number are needed: older versions of MLX wrote "
            "none of scale; it is what the update is multiplied by. Nothing was loaded."
        )
    return rank, float(scale), float(dropout)


def _layers(raw: Raw) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in raw.tensors.items():
        name, _, part = key.rpartition(".")
        if part in _PARTS:
            layers.setdefault(name, {})[part] = tensor
        else:
            unknown.append(key)
    if unknown:
        quantized = any(key.endswith(("_scales", "_biases")) for key in unknown)
        why = "A and B are quantized: save them before to_quantized" if quantized else "Leave them out, or say by them"
        raise CheckpointError(
            f"{raw.path} holds {len(unknown)} tensors beside lora_a, lora_b and m, which would be ignored: "
            f"{shorten(unknown, 3)}. {why}. Nothing was loaded."
        )
    return layers


def _placed(raw: Raw, name: str, parts: Mapping[str, Tensor], base: BaseNames) -> dict[str, dict[str, Tensor]]:
    """The tensors of one module of MLX by PEFT's names; experts, which MLX stacks, one by one."""
    missing = [part for part in ("lora_a", "lora_b") if part not in parts]
    if missing:
        raise CheckpointError(f"{raw.path}: {name} has no {' and no '.join(missing)}. Nothing was loaded.")
    a, b = parts["lora_a"], parts["lora_b"]
    if a.dim() == 3:
        owner, switch, leaf = name.rpartition(_SWITCH)
        if not switch or "m" in parts:
            raise CheckpointError(
                f"{raw.path}: {name} has a stack of factors {tuple(a.shape)}, and is no layer of experts "
                f"(<block>{_SWITCH}<layer>) with plain LoRA. Nothing was loaded."
            )
        return {
            f"{owner}.experts.{i}.{leaf}": {A: one, B: other} for i, (one, other) in enumerate(zip(a, b, strict=True))
        }
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise CheckpointError(
            f"{raw.path}: {name} has lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}, which are no (in, r) and "
            "(r, out). Nothing was loaded."
        )
    home = base.home(name)
    if home is not None and base.is_table(home):
        if "m" in parts:
            raise CheckpointError(
                f"{raw.path}: {name} is an embedding with DoRA. MLX has a norm for each token, and PEFT's DoRA one for "
                "each dimension, so no adapter has its values. Fuse it with mlx_lm.fuse. Nothing was loaded."
            )
        return {name: {TABLE_A: a.T, TABLE_B: b.T}}
    return {name: {A: a.T, B: b.T} | ({NORMS: parts["m"]} if "m" in parts else {})}
