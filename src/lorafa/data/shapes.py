"""Models without their weights: built from a config alone, on the meta device, where a tensor is only its shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafa.data.models import SMOLLM2, as_source_error, resolve_model
from lorafa.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _opt(hidden: int, layers: int, heads: int, dtype: str = "float16", **others: Any) -> dict[str, Any]:
    """OPT (Zhang et al. 2022, arXiv:2205.01068, table 1); the feed-forward layers are four times as wide."""
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    sides = {"word_embed_proj_dim": hidden, "vocab_size": 50272, "max_position_embeddings": 2048}
    return {"model_type": "opt", **size, **sides, "dtype": dtype, **others}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **others: Any) -> dict[str, Any]:
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {"model_type": "llama", **size, **attention, "dtype": "bfloat16", "tie_word_embeddings": False, **others}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    SMOLLM2: _llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3-70b": _llama(8192, 80, 64, 8, 28672, 128256),
}
"""Configs known by name, in transformers' own keys: nothing is fetched for them."""


def shape_model(
    name: str, dtype: torch.dtype | None = None, *, cache_dir: Path | None = None, revision: str | None = None
) -> PreTrainedModel:
    """A causal language model on the meta device: every layer is there, no number is.

    Args:
        name: one of ``SHAPES`` (which wins over a folder of that name), a local folder with a config.json, or a Hub id,
            of which only the config is fetched.
        dtype: of the weights; None takes the config's, float32 where it has none.
        cache_dir, revision: as in :func:`~lorafa.data.models.resolve_model`.

    Raises:
        SourceError: there is no such model, its config cannot be read, or it is not one of a causal language model.
    """
    known = SHAPES.get(name) if revision is None else None
    try:
        place = name if known else resolve_model(name, cache_dir=cache_dir, revision=revision)
    except SourceError as error:
        raise SourceError(f"{error} Shapes known by name: {', '.join(SHAPES)}.") from error
    from transformers import AutoConfig, AutoModelForCausalLM

    step = f"give model=<local folder with config.json>, a Hub id, or one of: {', '.join(SHAPES)}."
    with as_source_error(f"Could not make a causal language model from the config of {name!r}", step):
        config = AutoConfig.for_model(**known) if known else AutoConfig.from_pretrained(place, revision=revision)
        stored = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or stored)
    return model
