"""Every optimizer of ours under our trainer: the loss falls, and a resumed training ends bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lorafa.optimizers.pairs import pairs_of
from lorafa.train.settings.optim import OptimConfig, pair_optimizer
from lorafa.train.trainer import LoraTrainer
from toys.data import collate, samples
from toys.training import adapted_model

CASES: dict[str, dict[str, Any]] = {
    "lora_fa": {"name": "lora_fa"},
    "lora_fa fold": {"name": "lora_fa", "own": {"algorithm": "fold"}},
    "lora_plus": {"name": "lora_plus"},
    "riemannian": {"name": "riemannian"},
    "preconditioned": {"name": "preconditioned"},
    "lora_pro": {"name": "lora_pro"},
    "lora_pro full": {"name": "lora_pro", "own": {"form": "full"}},
}


def trainer(folder: Path, model: torch.nn.Module, optim: OptimConfig, steps: int, **more: Any) -> LoraTrainer:
    arguments = hf.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
        save_steps=2, logging_steps=1, seed=0, remove_unused_columns=False, learning_rate=optim.lr,
    )  # fmt: skip
    return LoraTrainer(
        model, arguments, train_dataset=samples(), data_collator=collate,
        optimizers=(pair_optimizer(model, optim), None), **more,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_lowers_the_loss(case: str, tmp_path: Path) -> None:
    model = adapted_model()
    ran = trainer(tmp_path, model, OptimConfig(lr=5e-3, **CASES[case]), 40)
    ran.train()
    losses = [row["loss"] for row in ran.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(pair.A.requires_grad != case.startswith("lora_fa") for pair in pairs_of(model))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_bit_equal(case: str, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, **CASES[case])
    whole = adapted_model(dropout=0.1)
    trainer(tmp_path, whole, optim, 4).train()
    resumed = adapted_model(dropout=0.1)
    trainer(tmp_path, resumed, optim, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.named_parameters())
    for name, value in resumed.named_parameters():
        assert torch.equal(value, expected[name]), name
