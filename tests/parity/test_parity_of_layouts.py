"""Files of other versions of a model that PEFT converts when it reads them: the same outputs as PEFT's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lorafa
from toys.compare import close
from toys.language_models import SMALL, logits, mixtral
from toys.layouts import pair, peft_config, peft_file, write

WIDTH, EXPERTS = 16, 3


def experts(block: str, names: tuple[str, str, str], inner: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of experts, router and a layer of attention, by the names of transformers 4."""
    factors = {}
    for layer in range(2):
        place = f"model.layers.{layer}"
        factors[f"{place}.self_attn.q_proj"] = pair(WIDTH, WIDTH, seed=layer)
        factors[f"{place}.{block}.gate"] = pair(EXPERTS, WIDTH, seed=layer)
        for expert in range(EXPERTS):
            for i, name in enumerate(names):
                out, in_ = (WIDTH, inner) if i == 2 else (inner, WIDTH)
                factors[f"{place}.{block}.experts.{expert}.{name}"] = pair(out, in_, seed=10 * layer + expert)
    return factors


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=20, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[Tensor, Tensor]], list[str]]] = {
    "mixtral": (mixtral, experts("block_sparse_moe", ("w1", "w3", "w2"), 20), ["q_proj", "gate", "w1", "w2", "w3"]),
    "qwen3_moe": (
        qwen3_moe,
        experts("mlp", ("gate_proj", "up_proj", "down_proj"), 12),
        ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"],
    ),
    "llava": (
        llava,
        {f"language_model.model.layers.{i}.self_attn.q_proj": pair(WIDTH, WIDTH, seed=i) for i in range(2)}
        | {"vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": pair(8, 8)},
        ["q_proj"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_of_older_versions_are_converted_as_in_peft(tmp_path: Path, name: str) -> None:
    make, factors, targets = CASES[name]
    folder = write(tmp_path, peft_file(factors), peft_config(*targets))
    other = {key: tensor.flip(0) for key, tensor in peft_file(factors).items()}
    torch.manual_seed(0)
    base = make().double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), autocast_adapter_dtype=False)
        ours = lorafa.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        with torch.no_grad():
            before = logits(ours)
        peft.set_peft_model_state_dict(theirs, other)
        lorafa.set_peft_model_state_dict(ours, other)
    with torch.no_grad():
        close(logits(ours), logits(theirs), 1e-9)
        assert not torch.allclose(logits(ours), before)


@pytest.mark.parametrize("name", CASES)
def test_files_of_older_versions_give_pefts_outputs(tmp_path: Path, name: str) -> None:
    make, factors, targets = CASES[name]

    def base() -> nn.Module:
        torch.manual_seed(0)
        return make().double().eval()

    folder = write(tmp_path, peft_file(factors), peft_config(*targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(), str(folder), autocast_adapter_dtype=False)
    ours = lorafa.PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():
        expected = logits(theirs)
        assert not torch.allclose(expected, logits(base())), "PEFT has read the file"
        close(logits(ours), expected, 1e-9)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"), autocast_adapter_dtype=False)
    with torch.no_grad():
        close(logits(again), expected, 1e-9)
