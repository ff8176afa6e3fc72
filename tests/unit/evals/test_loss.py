"""The loss of given answers."""

from __future__ import annotations

import math

import pytest
import torch

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collator
from lorafa.errors import DataError
from lorafa.evals.loss import answer_loss
from lorafa.models.head_loss import supervised_nll
from toys.language_models import tiny_llama

SAMPLES = [
    Sample([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4]),
    Sample([5, 6, 7, 8, 9, 10, 11], [IGNORE, 6, 7, 8, 9, 10, 11]),
    Sample([12, 13], [IGNORE, IGNORE]),
    Sample([14, 15, 16], [14, IGNORE, 16]),
]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_supervised_token_weighs_the_same_whatever_the_batch_size(batch_size):
    model = tiny_llama().eval()
    losses = []
    for sample in SAMPLES:
        logs = model(torch.tensor([sample.input_ids])).logits[0].double().log_softmax(-1)
        losses += [-logs[i - 1, t].item() for i, t in enumerate(sample.labels) if i and t != IGNORE]
    assert len(losses) == 9
    assert answer_loss(model, SAMPLES, Collator(0), batch_size) == pytest.approx(sum(losses) / 9, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_at_supervised_positions_alone_is_the_same(batch_size):
    model = tiny_llama().eval()
    of_all = answer_loss(model, SAMPLES, Collator(0), batch_size)
    assert answer_loss(model, SAMPLES, Collator(0), batch_size, supervised_nll) == pytest.approx(of_all, rel=1e-5)


def test_a_model_that_knows_nothing_loses_the_log_of_its_vocabulary():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert answer_loss(model, SAMPLES, Collator(0), 2) == pytest.approx(math.log(259), rel=1e-6)


def test_the_model_is_left_in_training_mode():
    model = tiny_llama().train()
    answer_loss(model, SAMPLES, Collator(0), 2)
    assert all(module.training for module in model.modules())


def test_nothing_supervised_is_an_error():
    with pytest.raises(DataError, match=r"None of the 1 samples has a supervised token.*Raise data\.eval_size"):
        answer_loss(tiny_llama(), SAMPLES[2:3], Collator(0), 2)
