"""Shapes of models known by name, as configs: nothing is fetched for them, and nothing is loaded to list them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMOLLM2 = "smollm2-135m"
"""The built-in model."""


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
"""Name -> config, in transformers' own keys."""
