"""A base model as a GGUF file, and llama.cpp to run it: written from its format, apart from what is exported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from torch import Tensor, nn

PYTHON = os.environ.get("LORAFA_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
"""An interpreter that has llama-cpp-python."""
SOURCES = os.environ.get("LORAFA_LLAMA_CPP")
"""A folder of llama.cpp's sources, with its conversion scripts."""
needs_llama_cpp = pytest.mark.skipif(PYTHON is None, reason="no interpreter with llama-cpp-python")
needs_sources = pytest.mark.skipif(SOURCES is None, reason="LORAFA_LLAMA_CPP names no sources of llama.cpp")

_RUN = """
import ctypes, json, sys
import numpy as np
import llama_cpp as lib
base, adapter, out, ids = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
lib.llama_backend_init()
model = lib.llama_model_load_from_file(base.encode(), lib.llama_model_default_params())
assert model, "the base was not loaded"
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_threads, params.type_k, params.type_v = 64, 64, 1, 0, 0  # keys in float32
context = lib.llama_init_from_model(model, params)
if adapter:
    lora = lib.llama_adapter_lora_init(model, adapter.encode())
    if not lora:
        sys.exit(3)
    assert lib.llama_set_adapters_lora(context, (type(lora) * 1)(lora), 1, (ctypes.c_float * 1)(1.0)) == 0
batch = lib.llama_batch_init(len(ids), 0, 1)
batch.n_tokens = len(ids)
for i, token in enumerate(ids):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
assert lib.llama_decode(context, batch) == 0
size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(ids))]
np.save(out, np.stack(rows))
"""


def llama_cpp_logits(base: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """Logits (tokens, vocabulary) of a row of token ids by llama.cpp on the CPU."""
    out = base.with_suffix(".npy")
    words = [str(PYTHON), "-c", _RUN, str(base), str(adapter or ""), str(out), json.dumps(ids)]
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=without)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.from_numpy(np.load(out))


def write_base(model: Any, architecture: str, path: Path, *, permutes: bool) -> Path:
    """The weights and numbers of a small causal model of transformers in a GGUF file, with a vocabulary of no words."""
    config, writer = model.config, GGUFWriter(None, architecture)
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rotary = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", 1e-5))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    tied = {id(model.get_output_embeddings().weight)} if config.tie_word_embeddings else set()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in tied & seen or name.endswith((".attn.bias", "masked_bias")):
            continue
        seen.add(id(tensor))
        values, parent = tensor.detach().float(), model.get_submodule(name.rpartition(".")[0])
        if type(parent).__name__ == "Conv1D" and values.dim() == 2:
            values = values.T
        if permutes and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, heads if "q_proj" in name else kv)
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), values.contiguous().numpy())
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head 0, d / 2, 1, d / 2 + 1 ..., one after another: the order llama.cpp rotates pairs in."""
    size = weight.shape[0] // heads
    order = [head * size + i + half * size // 2 for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def linears(model: nn.Module) -> list[str]:
    """Last names of the linear layers that are no head."""
    kinds = ("Linear", "Conv1D")
    return sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ in kinds} - {"lm_head"})
