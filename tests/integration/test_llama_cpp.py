"""llama.cpp itself beside what is exported for it: logits on the CPU, and the files of its own conversion script.

The first need an interpreter that has llama-cpp-python (here, or LORAFA_LLAMA_PYTHON), the others the sources of
llama.cpp (LORAFA_LLAMA_CPP); without them they are skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from torch import Tensor, nn

from lorafa import PeftModel
from lorafa.errors import CheckpointError
from lorafa.export.gguf import ARCHITECTURES
from lorafa.export.job import export_adapter
from lorafa.models.load import load_model
from toys.compare import close
from toys.exported import on_disk
from toys.gguf import SOURCES, linears, llama_cpp_logits, needs_llama_cpp, needs_sources, write_base

pytestmark = pytest.mark.slow
IDS = [1, 5, 7, 2, 9, 3, 4, 11]
ROUNDING = 2e-3
"""llama.cpp takes exponentials and attention in half precision here and there; a wrong scaling is off by far more."""
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 1,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Phi3ForCausalLM": {**SIZES, "partial_rotary_factor": 1.0},
    "MixtralForCausalLM": {**SIZES, "num_local_experts": 2},
    **{
        f"{name}ForCausalLM": {
            **SIZES,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 16,
        }
        for name in ("Qwen2Moe", "Qwen3Moe")
    },
}


def small(architecture: str, **settings: Any) -> Any:
    """A model of two layers of this class."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    return kind(kind.config_class(**(OWN.get(architecture, SIZES) | settings)))


@torch.no_grad()
def own_logits(model: nn.Module, ids: Sequence[int] = IDS) -> Tensor:
    found: Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return found


def base_file(architecture: str, model: Any, folder: Path) -> Path:
    known = ARCHITECTURES[architecture]
    return write_base(model, known.name, folder / "base.gguf", permutes=known.permutes)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "kasa": {"init_lora_weights": "kasa"},
    "tables": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
}


@needs_llama_cpp
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_llama_cpp_computes_the_adapted_model(settings: dict[str, Any], tmp_path: Path) -> None:
    base = small("LlamaForCausalLM")
    file, without = base_file("LlamaForCausalLM", base, tmp_path), own_logits(base)
    close(llama_cpp_logits(file, None, IDS), without, ROUNDING)
    model, folder = on_disk(tmp_path, base, **settings)
    export_adapter(folder, "gguf", tmp_path / "out", base=tmp_path / "base", verify=True)
    wanted = own_logits(model)
    assert float((wanted - without).abs().max()) > 0.05
    close(llama_cpp_logits(file, tmp_path / "out" / "adapter.gguf", IDS), wanted, ROUNDING)


@needs_llama_cpp
@pytest.mark.parametrize(
    "architecture",
    ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "Phi3ForCausalLM",
     "GPT2LMHeadModel"],
)  # fmt: skip
def test_it_does_so_on_models_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    base = small(architecture)
    file, without = base_file(architecture, base, tmp_path), own_logits(base)
    close(llama_cpp_logits(file, None, IDS), without, ROUNDING)
    model, folder = on_disk(tmp_path, base, target_modules=linears(base), alpha_pattern={linears(base)[0]: 2})
    export_adapter(folder, "gguf", tmp_path / "out", verify=True)
    wanted = own_logits(model)
    assert float((wanted - without).abs().max()) > 0.05
    close(llama_cpp_logits(file, tmp_path / "out" / "adapter.gguf", IDS), wanted, ROUNDING)


@needs_llama_cpp
def test_dora_at_a_rank_is_as_near_in_llama_cpp_as_on_the_base(tmp_path: Path) -> None:
    base = small("LlamaForCausalLM")
    file = base_file("LlamaForCausalLM", base, tmp_path)
    _, folder = on_disk(tmp_path, base, use_dora=True)
    export_adapter(folder, "gguf", tmp_path / "out", base=tmp_path / "base", rank=0.999)
    export_adapter(folder, "peft", tmp_path / "plain", base=tmp_path / "base", rank=0.999)
    plain = PeftModel.from_pretrained(small("LlamaForCausalLM"), tmp_path / "plain")
    close(llama_cpp_logits(file, tmp_path / "out" / "adapter.gguf", IDS), own_logits(plain), ROUNDING)


@needs_llama_cpp
def test_on_a_real_model_ours_is_the_adapter_and_one_alpha_for_all_is_not(tmp_path: Path) -> None:
    """SmolLM2-135M: ranks, alphas and rsLoRA of single layers; llama.cpp's own script writes one alpha for all."""
    base, tokenizer = load_model("smollm2-135m", "float32")
    file = base_file("LlamaForCausalLM", base, tmp_path)
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is")["input_ids"][:12]
    without = own_logits(base, ids)
    rounding = float((llama_cpp_logits(file, None, ids) - without).abs().max())
    model, folder = on_disk(
        tmp_path, base, size=0.004, r=16, lora_alpha=32, use_rslora=True, rank_pattern={"q_proj": 8},
        alpha_pattern={"v_proj": 5},
    )  # fmt: skip
    wanted = own_logits(model, ids)
    effect = float((wanted - without).abs().max())
    export_adapter(folder, "gguf", tmp_path / "out", verify=True)
    ours = llama_cpp_logits(file, tmp_path / "out" / "adapter.gguf", ids)
    difference = float((ours - wanted).abs().max())
    print(f"logits: adapter {effect:.3f}, ours off by {difference:.3f}, llama.cpp without an adapter by {rounding:.3f}")
    assert difference < 0.02 * effect
    assert torch.equal(ours.argmax(-1), wanted.argmax(-1))
    if SOURCES is not None:
        theirs = tmp_path / "theirs.gguf"
        convert(folder, tmp_path / "base", theirs)
        off = float((llama_cpp_logits(file, theirs, ids) - wanted).abs().max())
        print(f"the file of llama.cpp's script: off by {off:.3f}")
        assert off > 0.2 * effect


def convert(folder: str, base: Path, out: Path) -> None:
    """What llama.cpp's own script makes of an adapter."""
    words = [sys.executable, f"{SOURCES}/convert_lora_to_gguf.py", folder, "--base", str(base), "--outfile", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_sources
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_is_that_of_llama_cpps_own_script(architecture: str, tmp_path: Path) -> None:
    base = small(architecture)
    mixture = "Moe" in architecture or architecture.startswith("Mixtral")
    targets = [f"{name}_proj" for name in "qkvo"] if mixture else linears(base)
    _, folder = on_disk(tmp_path, base, target_modules=targets, r=3, lora_alpha=6)
    export_adapter(folder, "gguf", tmp_path / "out")
    convert(folder, tmp_path / "base", tmp_path / "theirs.gguf")
    ours, theirs = GGUFReader(tmp_path / "out" / "adapter.gguf"), GGUFReader(tmp_path / "theirs.gguf")
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents()
    one, other = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert one.keys() == other.keys()
    same = [np.array_equal(one[key].data, other[key].data) for key in one]
    if architecture == "GPT2LMHeadModel":  # theirs turns A and B round as if they lay like Conv1D's weight
        assert not all(same)
    else:
        assert all(same)


@needs_llama_cpp
def test_llama_cpp_refuses_what_is_refused_here(tmp_path: Path) -> None:
    """Of a model with one table for embedding and head the file would have tensors that no such base has."""
    base = small("LlamaForCausalLM", tie_word_embeddings=True)
    file = base_file("LlamaForCausalLM", base, tmp_path)
    _, folder = on_disk(tmp_path, base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match="one table there"):
        export_adapter(folder, "gguf", tmp_path / "out", base=tmp_path / "base")
    _, untied = on_disk(tmp_path / "untied", small("LlamaForCausalLM"), target_modules=["q_proj", "lm_head"])
    export_adapter(untied, "gguf", tmp_path / "out", base=tmp_path / "untied" / "base")
    with pytest.raises(AssertionError, match=r"'output.weight' does not exist in base model"):
        llama_cpp_logits(file, tmp_path / "out" / "adapter.gguf", IDS)
