"""Small models, and one config each, on which lorafa and PEFT are compared."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lorafa
from toys.language_models import (
    IDS,
    Transposed,
    bert,
    gpt2,
    llama,
    logits,
    mixtral,
    qwen2_moe,
    seq2seq_logits,
    t5,
)
from toys.models import Attention, Convolution, Linears, Lookup, Mixture


def on(*shape: int) -> Callable[[nn.Module], Tensor]:
    """Run on fixed random numbers of a shape."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return lambda model: model(x.to(next(model.parameters()).dtype))


@dataclass(frozen=True)
class Case:
    """A model, how to run it, and the settings both libraries get."""

    model: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    settings: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    """Settings that only lorafa has."""
    dtype: torch.dtype = torch.float64

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().to(self.dtype).eval()

    def lorafa(self, base: nn.Module | None = None) -> lorafa.PeftModel:
        with quiet():
            config = lorafa.LoraConfig(**copy.deepcopy(self.settings), **self.ours)
            return lorafa.get_peft_model(base or self.base(), config).eval()

    def peft(self, base: nn.Module | None = None) -> peft.PeftModel:
        with quiet():
            torch.manual_seed(3)
            return peft.get_peft_model(base or self.base(), peft.LoraConfig(**copy.deepcopy(self.settings))).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """A with-block in which neither library warns; what they warn of is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def said(call: Callable[[], Any]) -> set[str]:
    """The texts of the warnings a call gives."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return {str(warning.message) for warning in found}


def trained(model: nn.Module, seed: int = 11) -> nn.Module:
    """Move every trainable parameter as training would: by different amounts, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def output(case: Case, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return case.run(model)


def stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def stored_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


LINEAR = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "rank_pattern": {"r": 2, "rank_pattern": {"first": 5}, "lora_alpha": 4},
    "alpha_pattern": {"r": 2, "alpha_pattern": {".*second": 7}, "lora_alpha": 4},
    "both_patterns_rslora": {"rank_pattern": {"first": 3}, "alpha_pattern": {"first": 9}, "use_rslora": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["head", "norm"]},
    "exclude_list": {"target_modules": ["first", "second", "head"], "exclude_modules": ["head"]},
    "exclude_regex": {"target_modules": "first|second", "exclude_modules": "se.*"},
    "regex": {"target_modules": "fi.*|.*ond"},
    "all_linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "random": {"init_lora_weights": False},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"first": 3}},
    "dropout": {"lora_dropout": 0.5},
    "everything": {
        "r": 2, "lora_alpha": 3.5, "use_rslora": True, "bias": "all", "lora_bias": True, "modules_to_save": ["head"],
        "rank_pattern": {"second": 4}, "alpha_pattern": {"first": 2}, "lora_dropout": 0.1,
    },
}  # fmt: skip

LLAMA = {
    "default_targets": {"task_type": "CAUSAL_LM"},
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "dotted_list": {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.[12]\..*(k|o)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one_layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "pattern_list": {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "k_proj"]},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.0\..*q_proj": 3, "v_proj": 2}},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "save_both_ends": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "token_list": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 7]},
    "token_dict": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2, 0, 9]}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}

CASES: dict[str, Case] = {
    **{
        f"linear-{name}": Case(Linears, on(5, 12), {"target_modules": ["first", "second"]} | settings)
        for name, settings in LINEAR.items()
    },
    "linear-modules_by_index": Case(
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), on(5, 12), {"target_modules": ["0"]}
    ),
    "embedding": Case(Lookup, lambda m: m(IDS), {"target_modules": ["table"], "r": 3, "lora_alpha": 5}),
    "embedding-and-linear": Case(Lookup, lambda m: m(IDS), {"target_modules": ["table", "head"], "r": 3}),
    "embedding-random": Case(Lookup, lambda m: m(IDS), {"target_modules": ["table"], "init_lora_weights": False}),
    "embedding-dora": Case(Lookup, lambda m: m(IDS), {"target_modules": ["table"], "r": 3, "use_dora": True}),
    "embedding-tokens": Case(
        Lookup, lambda m: m(IDS), {"target_modules": ["head"], "trainable_token_indices": {"table": [1, 5]}}
    ),
    "conv1d": Case(lambda: Convolution(1), on(2, 4, 7), {"target_modules": ["conv"], "r": 3, "lora_alpha": 5}),
    "conv2d": Case(
        lambda: Convolution(2, stride=2, padding=1), on(2, 4, 7, 6), {"target_modules": ["conv", "head"], "r": 3}
    ),
    "conv3d": Case(lambda: Convolution(3), on(2, 4, 4, 5, 3), {"target_modules": ["conv"], "r": 2}),
    "conv2d-groups": Case(lambda: Convolution(2, groups=2), on(2, 4, 5, 5), {"target_modules": ["conv"], "r": 4}),
    "conv1d-dora": Case(lambda: Convolution(1), on(2, 4, 7), {"target_modules": ["conv"], "use_dora": True}),
    "conv2d-dora": Case(lambda: Convolution(2), on(2, 4, 5, 5), {"target_modules": ["conv"], "use_dora": True}),
    "conv3d-dora": Case(lambda: Convolution(3), on(2, 4, 4, 4, 4), {"target_modules": ["conv"], "use_dora": True}),
    "conv2d-lora_bias": Case(lambda: Convolution(2), on(2, 4, 5, 5), {"target_modules": ["conv"], "lora_bias": True}),
    "conv2d-bias": Case(lambda: Convolution(2), on(2, 4, 5, 5), {"target_modules": ["conv"], "bias": "lora_only"}),
    "transposed": Case(Transposed, on(5, 12), {"target_modules": ["first"], "fan_in_fan_out": True, "r": 3}),
    "transposed-corrected": Case(Transposed, on(5, 12), {"target_modules": ["first", "head"], "r": 3}),
    "transposed-dora": Case(
        Transposed, on(5, 12), {"target_modules": ["first"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "attention": Case(
        Attention, on(2, 5, 12), {"target_modules": ["attention"], "r": 3}, {"attention_out_proj_twice": True}
    ),
    "attention-bias": Case(
        Attention,
        on(2, 5, 12),
        {"target_modules": ["attention", "head"], "bias": "all"},
        {"attention_out_proj_twice": True},
    ),
    "attention-bias_lora_only": Case(
        Attention,
        on(2, 5, 12),
        {"target_modules": ["attention", "head"], "bias": "lora_only"},
        {"attention_out_proj_twice": True},
    ),
    "parameter-2d": Case(
        Mixture, on(5, 12), {"target_modules": [], "target_parameters": ["experts.matrix"], "r": 3, "lora_alpha": 5}
    ),
    "parameter-3d": Case(
        Mixture, on(5, 12), {"target_modules": ["head"], "target_parameters": ["experts.up"], "r": 2, "lora_alpha": 5}
    ),
    "parameter-nested": Case(
        Mixture, on(5, 12), {"target_modules": [], "target_parameters": ["up", "down"], "r": 3, "use_rslora": True}
    ),
    "parameter-nested-rank_pattern": Case(
        Mixture,
        on(5, 12),
        {
            "target_modules": [],
            "target_parameters": ["experts.up", "experts.down", "experts.matrix"],
            "rank_pattern": {"experts.up": 2},
        },
    ),
    **{
        f"llama-{name}": Case(lambda: llama(num_hidden_layers=3), logits, settings | {"r": 4})
        for name, settings in LLAMA.items()
    },
    "llama-tied-embedding": Case(
        lambda: llama(tie_word_embeddings=True), logits, {"target_modules": ["embed_tokens"], "r": 4}
    ),
    **{
        f"llama-tied-{name}": Case(lambda: llama(tie_word_embeddings=True), logits, settings | {"r": 4})
        for name, settings in {
            "head": {"target_modules": ["lm_head", "v_proj"]},
            "both_ends": {"target_modules": ["lm_head", "embed_tokens"]},
            "saved_head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
            "saved_embedding": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
            "all_linear": {"target_modules": "all-linear"},
        }.items()
    },
    "llama-tied-tokens": Case(
        lambda: llama(tie_word_embeddings=True),
        logits,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 8]},
    ),
    "gpt2-embedding": Case(gpt2, logits, {"target_modules": ["wte", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-tokens": Case(
        gpt2, logits, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": [4, 9]}
    ),
    "gpt2-default": Case(gpt2, logits, {"fan_in_fan_out": True}),
    "gpt2-all_linear": Case(gpt2, logits, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2-dora": Case(gpt2, logits, {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "t5-default": Case(t5, seq2seq_logits, {"task_type": "SEQ_2_SEQ_LM"}),
    "t5-all_linear": Case(t5, seq2seq_logits, {"target_modules": "all-linear"}),
    "bert-default": Case(bert, logits, {"task_type": "SEQ_CLS"}),
    "bert-all_linear": Case(bert, logits, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "bert-token_classification": Case(
        lambda: bert(transformers.BertForTokenClassification), logits, {"task_type": "TOKEN_CLS"}
    ),
    "bert-question_answering": Case(
        lambda: bert(transformers.BertForQuestionAnswering, 2),
        lambda m: m(input_ids=IDS).start_logits,
        {"task_type": "QUESTION_ANS"},
    ),
    "bert-saved_layer": Case(bert, logits, {"target_modules": ["query"], "modules_to_save": ["encoder.layer.1"]}),
    "bert-features": Case(
        lambda: bert(transformers.BertModel),
        lambda m: m(input_ids=IDS).last_hidden_state,
        {"task_type": "FEATURE_EXTRACTION"},
    ),
    "bert-bias": Case(bert, logits, {"target_modules": ["query", "dense"], "bias": "all"}),
    "mixtral-attention": Case(mixtral, logits, {"target_modules": ["q_proj", "v_proj"]}),
    "mixtral-experts": Case(
        mixtral,
        logits,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "r": 2,
        },
    ),
    "qwen2_moe-experts": Case(
        qwen2_moe,
        logits,
        {
            "target_modules": ["v_proj", "shared_expert.up_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "mixtral-router": Case(mixtral, logits, {"target_modules": [], "target_parameters": ["gate.weight"], "r": 2}),
}
