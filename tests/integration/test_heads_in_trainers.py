"""Trainers of transformers with AdapterCheckpoints in front stop where an adapter gets no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import TrainingError
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from toys.data import collate, samples
from toys.training import CONFIG, adapted_model


class HeadTrainer(AdapterCheckpoints, hf.Trainer):  # type: ignore[misc]
    """Computes its loss from the weight of the output head, as TRL's does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        base = model.get_base_model()
        hidden = base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        logits = hidden[:, :-1] @ base.lm_head.weight.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, logits) if return_outputs else loss


def head_trainer(folder: Path, model: nn.Module, **own: Any) -> HeadTrainer:
    args = hf.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_strategy="no"
    )
    return HeadTrainer(model, args, train_dataset=samples(), data_collator=collate, **own)


def with_head(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(hf.LlamaForCausalLM(CONFIG), LoraConfig(r=2, **settings))


def test_trainer_that_reads_the_heads_weight_stops_if_the_head_is_a_target(tmp_path: Path) -> None:
    model = with_head(target_modules=["q_proj", "lm_head"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match=r"1 of 3 adapted layers got no gradient: lm_head\. .* modules_to_save"):
        head_trainer(tmp_path, model).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    unchecked = head_trainer(tmp_path, model, check_gradients=False)
    unchecked.train()
    assert unchecked.state.global_step == 2


def test_it_trains_the_head_by_modules_to_save(tmp_path: Path) -> None:
    model = with_head(target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = model.get_base_model().lm_head.weight.detach().clone()
    head_trainer(tmp_path, model).train()
    assert not torch.equal(model.get_base_model().lm_head.weight, before)


def test_loss_without_a_slope_does_not_stop_other_trainers_than_ours(tmp_path: Path) -> None:
    class Flat(HeadTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * 0.0

    arguments = head_trainer(tmp_path, adapted_model()).args
    flat = Flat(adapted_model(), arguments, train_dataset=samples(), data_collator=collate)
    flat.train()
    assert flat.state.global_step == 2
