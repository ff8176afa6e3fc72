"""Preferences to train on: a tiny model, pairs of answers as token ids, and the trainer of an objective on them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import lorafa
from lorafa.train.fit import training_settings
from lorafa.train.objectives.rows import Rows
from lorafa.train.objectives.work import Work
from lorafa.train.settings.data import DataConfig
from lorafa.train.settings.objective import ObjectiveConfig
from lorafa.train.settings.optim import OptimConfig
from lorafa.train.settings.run import EvalConfig, RunConfig, TrainConfig
from toys.language_models import byte_tokenizer, tiny_llama

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def pairs(count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with two answers of several lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=draw).tolist()

    return [
        {"prompt_ids": ids(3 + n), "chosen_ids": ids(2 + n % 3), "rejected_ids": ids(4 - n % 2), "length": 7 + n}
        for n in range(count)
    ]


def judged(count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with one answer that is good or bad."""
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": n % 2 == 0, "length": 9}
        for n, row in enumerate(pairs(count, seed))
    ]


def adapted(base: LlamaForCausalLM | None = None, **changes: Any) -> Any:
    """A model in float64 with an adapter that is trained."""
    torch.manual_seed(1)
    made = lorafa.get_peft_model(
        (tiny_llama() if base is None else base).double(),
        lorafa.LoraConfig(**({"r": 2, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes)),
        autocast_adapter_dtype=False,
    )
    return made.double()


def config_of(name: str, own: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """The settings of a run of two steps of two rows."""
    settings = {"steps": 2, "batch_size": 2, "group_by_length": False} | train
    return RunConfig(
        data=DataConfig(name="rows.jsonl"),
        train=TrainConfig(**settings),
        optim=OptimConfig(lr=1e-2),
        eval=EvalConfig(batch_size=2),
        objective=ObjectiveConfig(name=name, own=own),
    )


def trainer_of(folder: Path, model: Any, config: RunConfig, rows: list[dict[str, Any]], **more: Any) -> Any:
    """The trainer that a run with this config would have."""
    told = training_settings(config, folder) | {"use_cpu": True, "run_name": "toy"}
    work = Work(model, byte_tokenizer(), Rows(rows, more.pop("heldout", [])), config, told, {"callbacks": []} | more)
    made = config.objective.entry.trainer
    assert made is not None
    return made(work)


def loss_of(trainer: Any, rows: list[dict[str, Any]]) -> Tensor:
    """The loss of rows in one batch."""
    columns = trainer.train_dataset.column_names
    batch = trainer._prepare_inputs(trainer.data_collator([{name: row[name] for name in columns} for row in rows]))
    return trainer.compute_loss(trainer.model, batch)


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """log p of an answer, by its definition."""
    ids = torch.tensor([[*prompt, *answer]])
    logs = F.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return torch.stack([logs[place, token] for place, token in zip(places, answer, strict=True)]).sum()


