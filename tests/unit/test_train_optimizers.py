"""Every optimizer from its settings to a trained adapter, and what its settings refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from trainer_toys import adapted_model, collate, samples

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.optimizers import LoraFAOptimizer
from lorafa.optimizers.pairs import pairs_of
from lorafa.train.optimizers import pair_optimizer
from lorafa.train.schema import OPTIONS_OF_ONE, OptimConfig
from lorafa.train.trainer import LoraTrainer

CASES: dict[str, dict[str, Any]] = {
    "lora_fa": {"name": "lora_fa"},
    "lora_fa fold": {"name": "lora_fa", "algorithm": "fold"},
    "lora_plus": {"name": "lora_plus"},
    "riemannian": {"name": "riemannian"},
    "preconditioned": {"name": "preconditioned"},
    "lora_pro": {"name": "lora_pro"},
    "lora_pro full": {"name": "lora_pro", "form": "full"},
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


def test_stock_optimizers_are_left_to_transformers() -> None:
    assert pair_optimizer(adapted_model(), OptimConfig(name="adamw")) is None


def test_settings_reach_the_optimizer() -> None:
    optim = compose(["optim=lora_fa", "optim.lr=3e-3", "optim.weight_decay=0.2"]).optim
    optimizer = pair_optimizer(adapted_model(), optim)
    assert isinstance(optimizer, LoraFAOptimizer)
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert optimizer.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize("option", OPTIONS_OF_ONE)
def test_an_option_of_another_optimizer_is_refused(option: str) -> None:
    value = {"algorithm": "fold", "damping": "absolute", "form": "full", "X": "zero"}.get(option, "0.5")
    with pytest.raises(ConfigError, match=rf"optim.{option} belongs to optim={OPTIONS_OF_ONE[option]}, found"):
        compose([f"optim.{option}={value}"])


def test_best_checkpoints_are_measured_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match=r"keep_best measures at every checkpoint .*=4.*eval_every=3"):
        compose(["train.keep_best=true", "train.checkpoint_every=4", "train.eval_every=3"])
