"""Llama 3 (arXiv:2407.21783, table 3), and the shape of its kind."""

from __future__ import annotations

from typing import Any

from lorafa.models.entry import KnownModel


def llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **others: Any) -> dict[str, Any]:
    """A config of transformers' Llama."""
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {"model_type": "llama", **size, **attention, "dtype": "bfloat16", "tie_word_embeddings": False, **others}


LLAMA_3_8B = KnownModel(shape=llama(4096, 32, 32, 8, 14336, 128256))
LLAMA_3_70B = KnownModel(shape=llama(8192, 80, 64, 8, 28672, 128256))
