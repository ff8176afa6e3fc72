"""OPT (Zhang et al. 2022, arXiv:2205.01068, table 1)."""

from __future__ import annotations

from typing import Any

from lorafa.models.entry import KnownModel


def _opt(hidden: int, layers: int, heads: int, dtype: str = "float16", **others: Any) -> dict[str, Any]:
    """The feed-forward layers are four times as wide."""
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    sides = {"word_embed_proj_dim": hidden, "vocab_size": 50272, "max_position_embeddings": 2048}
    return {"model_type": "opt", **size, **sides, "dtype": dtype, **others}


OPT_125M = KnownModel(shape=_opt(768, 12, 12))
OPT_350M = KnownModel(shape=_opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False))
OPT_1_3B = KnownModel(shape=_opt(2048, 24, 32))
