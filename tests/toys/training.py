"""A tiny language model, its samples and a trainer for them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers as hf
from torch import nn

import lorafa
from lorafa.train.trainer import LoraTrainer
from toys.data import VOCAB, collate, samples

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime", "train_loss"}
TIMES |= {"eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time", "total_flos"}
CONFIG = hf.LlamaConfig(
    vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, head_dim=4
)


def adapted_model(
    dropout: float = 0.0, library: ModuleType = lorafa, base: dict[str, Any] | None = None, **changes: Any
) -> nn.Module:
    """``base`` changes the model's config, ``changes`` the adapter's."""
    torch.manual_seed(0)
    config = library.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, **changes)
    return library.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**(CONFIG.to_dict() | (base or {})))), config)


def trainer_for(
    folder: Path, model: nn.Module | None = None, own: dict[str, Any] | None = None, **args: Any
) -> LoraTrainer:
    """A trainer of a small model on CPU; ``own`` are settings of the trainer, ``args`` of TrainingArguments."""
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 8, "logging_steps": 3} | args
    arguments = hf.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=5, **{"save_strategy": "no", **settings}
    )
    data = {"train_dataset": samples(), "eval_dataset": samples(5, seed=1), "data_collator": collate}
    return LoraTrainer(adapted_model() if model is None else model, arguments, **(data | (own or {})))


class Do(hf.TrainerCallback):
    """Call a function at one event of the training loop."""

    def __init__(self, event: str, action: Any) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: action(state))


class Killed(Exception):
    pass


def kill_after(step: int) -> Do:
    def kill(state: hf.TrainerState) -> None:
        if state.global_step == step:
            raise Killed

    return Do("on_step_end", kill)


def log_of(trainer: LoraTrainer) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in trainer.state.log_history]
