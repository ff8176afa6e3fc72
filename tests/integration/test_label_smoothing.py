"""Label smoothing in trainers of transformers: the labels are shifted, as for PEFT's model.

Where ``label_smoothing_factor`` is set the trainer computes the loss itself, and decides by the name of the model's
class whether the labels are those of the next token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import log_softmax

import lorafa
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from lorafa.train.trainer import LoraTrainer
from toys.data import collate, samples
from toys.training import adapted_model


class WithCheckpoints(AdapterCheckpoints, transformers.Trainer):
    pass


TRAINERS = [transformers.Trainer, WithCheckpoints, LoraTrainer]
SMOOTHING = 0.1


def trained(kind: Any, folder: Path, library: Any = lorafa, **options: Any) -> Any:
    """A trainer after three steps of two micro-batches, the losses of the steps in its log."""
    model = adapted_model(library=library, init_lora_weights=False)
    with torch.no_grad():  # the same adapter in both libraries, whose random numbers differ
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=5, max_steps=3, logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, save_strategy="no",
        **{"label_smoothing_factor": SMOOTHING} | options,
    )  # fmt: skip
    trainer = kind(model, arguments, train_dataset=samples(), eval_dataset=samples(4, seed=1), data_collator=collate)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer_takes_the_steps_of_a_plain_one_with_the_model_of_peft(kind: Any, tmp_path: Path) -> None:
    ours, theirs = trained(kind, tmp_path), trained(transformers.Trainer, tmp_path, peft)
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-4, atol=1e-4)  # of logs, which are rounded
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_loss_is_that_of_the_formula_for_the_next_tokens(kind: Any, tmp_path: Path) -> None:
    """(1 - e) NLL + e mean over the vocabulary of -log p, averaged over the labelled positions."""
    trainer = trained(kind, tmp_path)
    batch = collate(samples(4, seed=7))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model.eval(), dict(batch))
        log_p = log_softmax(trainer.model(**batch).logits[:, :-1].float(), -1)
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    nll = -log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0][counts].mean()
    even = -log_p.mean(-1)[counts].mean()
    torch.testing.assert_close(found, (1 - SMOOTHING) * nll + SMOOTHING * even, rtol=1e-5, atol=1e-6)


def test_the_model_is_printed_under_its_own_name() -> None:
    model = adapted_model()
    assert repr(model).startswith("PeftModel(\n  (base_model): LoraModel(\n    (model): LlamaForCausalLM(")
    assert "(0): PeftModel(" in repr(nn.Sequential(model))
