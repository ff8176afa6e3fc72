"""The losses of preferences by their formulas, and where their reference is: the model at step 0.

Models are in float64; TRL takes log-probabilities in float32, and what is compared with a formula is as exact as these.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lorafa
from toys.objectives import adapted, config_of, judged, log_probability, loss_of, needs_trl, pairs, trainer_of

pytestmark = [needs_trl, pytest.mark.slow]  # TRL takes seconds to import

STARTS = {
    "fresh": {},
    "no identity": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True, "init_lora_weights": False},
    "rslora, bias": {"use_rslora": True, "bias": "lora_only", "init_lora_weights": False},
    "a module trained whole": {"modules_to_save": ["o_proj"], "init_lora_weights": False},
}


def moved(model: Any, by: float = 0.05, seed: int = 7) -> None:
    """All that is trained is somewhere else."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


@pytest.mark.parametrize("start", STARTS)
def test_the_loss_of_dpo_is_log_2_at_step_0_whatever_the_start(start: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, adapted(**STARTS[start]), config_of("dpo"), pairs())
    assert loss_of(trainer, pairs()).item() == float(-F.logsigmoid(torch.zeros(())))  # to the last bit


@pytest.mark.parametrize("start", ["no identity", "dora", "rslora, bias", "a module trained whole"])
def test_the_reference_is_the_model_that_training_began_from(start: str, tmp_path: Path) -> None:
    model = adapted(**STARTS[start])
    moved(model, 0.2, seed=1)  # an adapter that was trained before
    ids = torch.tensor([[5, 6, 7, 8]])
    began = model.eval()(input_ids=ids).logits.detach()
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids).logits, began, atol=1e-3)  # the base is another model
    trainer = trainer_of(tmp_path, model, config_of("dpo"), pairs())
    moved(model)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(trainer.reference(input_ids=ids).logits, began, rtol=0, atol=1e-12)
        assert not torch.allclose(model(input_ids=ids).logits, began, atol=1e-3)
    assert all(module.training for module in model.modules())


def by_formula(model: Any, began: dict[str, Tensor], rows: list[dict[str, Any]], beta: float) -> Tensor:
    """Equation 7 of the paper: the mean of -log sigmoid(beta (log ratio of chosen - that of rejected))."""
    losses = []
    for at, row in enumerate(rows):
        ratios = {
            which: log_probability(model, row["prompt_ids"], row[f"{which}_ids"]) - began[which][at]
            for which in ("chosen", "rejected")
        }
        losses.append(-F.logsigmoid(beta * (ratios["chosen"] - ratios["rejected"])))
    return torch.stack(losses).mean()


def test_the_gradient_of_dpo_is_that_of_its_formula(tmp_path: Path) -> None:
    model, rows = adapted(init_lora_weights=False), pairs()
    with torch.no_grad():
        began = {
            which: torch.stack([log_probability(model, row["prompt_ids"], row[f"{which}_ids"]) for row in rows])
            for which in ("chosen", "rejected")
        }
    trainer = trainer_of(tmp_path, model, config_of("dpo", {"beta": 0.3}), rows)
    moved(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(by_formula(model, began, rows, 0.3), list(trained.values()))
    found = torch.autograd.grad(loss_of(trainer, rows), list(trained.values()))
    for name, one, other in zip(trained, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_of_kto_is_one_half_at_step_0(tmp_path: Path) -> None:
    """1 - sigmoid(0) for every answer, good or bad, and no KL."""
    model, rows = adapted(init_lora_weights=False), judged()
    trainer = trainer_of(tmp_path, model, config_of("kto"), rows)
    assert loss_of(trainer, list(trainer.train_dataset)[:2]).item() == pytest.approx(0.5, abs=1e-12)


def test_the_loss_of_orpo_is_that_of_its_formula(tmp_path: Path) -> None:
    """Equations 6 and 7: the likelihood of prompt and better answer, and lambda times -log sigmoid(log odds ratio),
    where the odds are of the mean log-probability of a token."""
    model, rows = adapted(init_lora_weights=False), pairs(2)
    trainer = trainer_of(tmp_path, model, config_of("orpo", {"beta": 0.25}), rows)
    with torch.no_grad():
        texts = [[*row["prompt_ids"], *row["chosen_ids"]] for row in rows]
        whole = [log_probability(model, text[:1], text[1:]) for text in texts]
        tokens = sum(len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) for row in rows)
        odds = []
        for row in rows:
            mean = {
                which: log_probability(model, row["prompt_ids"], row[f"{which}_ids"]) / len(row[f"{which}_ids"])
                for which in ("chosen", "rejected")
            }
            odds.append(sum(sign * (m - torch.log1p(-m.exp())) for sign, m in zip((1, -1), mean.values(), strict=True)))
        expected = -torch.stack(whole).sum() / tokens - 0.25 * F.logsigmoid(torch.stack(odds)).mean()
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).double(), expected, rtol=1e-6, atol=1e-6)


def test_what_a_method_adds_to_the_loss_is_added(tmp_path: Path) -> None:
    model = adapted(kasa_config=lorafa.KasaConfig())
    trainer = trainer_of(tmp_path, model, config_of("dpo"), pairs())
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    added = lorafa.penalty(model)
    assert added.item() > 0
    assert loss_of(trainer, pairs()).item() == pytest.approx(math.log(2) + added.item(), rel=1e-6)
