"""The start of a run reads its first training rows, and says when these cannot give what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig
from lorafa.data.chat import Sample
from lorafa.data.collate import Collator
from lorafa.errors import ConfigError, DataError
from lorafa.settings.typed import build
from lorafa.train.settings.init import InitConfig, start_fields
from lorafa.train.start import Started, start_adapter

transformers = pytest.importorskip("transformers")
ROWS = [Sample([1, 2, n, 4], [-100, 2, n, 4]) for n in range(3, 20)]


def start(rows: list[Sample] = ROWS, **settings: Any) -> Started:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    init = build(InitConfig, settings, "init")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_seed=0, **start_fields(init))
    return start_adapter(model, adapter, init, rows, Collator(0))


def test_ranks_by_cross_validation_take_two_batches() -> None:
    text = r"init\.ranks=cross_validation compares two halves of the batches, and init\.iters is 1\. Set"
    with pytest.raises(ConfigError, match=text):
        start(mode="lora_one", ranks="cross_validation", iters=1, bsz=4)
    assert start(mode="lora_one", ranks="cross_validation", iters=2).record["ranks"]
    assert start(mode="lora_one", ranks="budget", iters=1).record["ranks"]


def test_passes_over_data_whose_gradients_are_not_read() -> None:
    with pytest.raises(ConfigError, match=r"init\.passes=2 would change nothing"):
        start(mode="eva", passes=2)


def test_rows_are_held_out_where_the_size_of_the_step_is_chosen_by_them() -> None:
    assert start(mode="lora_one", iters=2, stable_gamma="auto").record["stable_gamma"] > 0
    assert start(ROWS[:2], mode="lora_one", iters=2, stable_gamma=128.0).record["stable_gamma"] == 128
    with pytest.raises(DataError, match=r"init reads 2 rows .* for stable_gamma=auto a few more; there are 2"):
        start(ROWS[:2], mode="lora_one", iters=2, stable_gamma="auto")


def test_rows_whose_answers_are_cut_off() -> None:
    rows = [*ROWS[:2], Sample([1, 2, 3, 4], [-100, -100, -100, 4])]
    with pytest.raises(DataError, match=r"row 3 of the training rows has no trained token among its first 3\. Raise"):
        start(rows, mode="lora_one", iters=3, max_length=3)
    assert start(rows, mode="corda", iters=3, max_length=3).record["rows"] == 3
