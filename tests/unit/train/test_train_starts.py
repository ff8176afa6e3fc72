"""The start of a run reads its first training rows, and says when these cannot give what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig
from lorafa.data.chat import Sample
from lorafa.data.collate import Collator
from lorafa.errors import ConfigError, DataError
from lorafa.settings.typed import build
from lorafa.starts.gamma import GAMMAS
from lorafa.train.settings.init import InitConfig, start_fields
from lorafa.train.start import Started, start_adapter
from toys.language_models import llama as of_two_layers

transformers = pytest.importorskip("transformers")
ROWS = [Sample([1, 2, n, 4], [-100, 2, n, 4]) for n in range(3, 20)]


TARGETS = ["q_proj", "down_proj"]
SIDES = {"model.layers.0.self_attn.q_proj": 16 + 16, "model.layers.0.mlp.down_proj": 16 + 24}
"""Parameters of a rank, of every target."""


def llama() -> nn.Module:
    return of_two_layers(num_hidden_layers=1)


def start(
    rows: list[Sample] = ROWS, model: nn.Module | None = None, adapter: dict[str, Any] | None = None, **settings: Any
) -> Started:
    init = build(InitConfig, settings, "init")
    fields = {"r": 2, "target_modules": TARGETS, "init_seed": 0} | start_fields(init) | (adapter or {})
    return start_adapter(model or llama(), LoraConfig(**fields), init, rows, Collator(0))


def test_ranks_by_cross_validation_take_two_batches() -> None:
    text = r"init\.ranks=cross_validation compares two halves of the batches, and init\.iters is 1\. Set"
    with pytest.raises(ConfigError, match=text):
        start(mode="lora_one", ranks="cross_validation", iters=1, bsz=4)
    assert start(mode="lora_one", ranks="cross_validation", iters=2).record["ranks"].keys() == SIDES.keys()


@pytest.mark.parametrize("rule", ["budget", "entropy"])
def test_the_ranks_of_a_rule_are_those_of_the_adapter_and_are_recorded(rule: str) -> None:
    """A budget of rank 4 everywhere is spent to the last rank it pays for; gradients of few rows fill no rank of 4."""
    made = start(mode="lora_one", ranks=rule, iters=4, adapter={"r": 4})
    ranks = made.record["ranks"]
    assert ranks == {path: layer.r["default"] for path, layer in made.model.base_model.lora_layers()}
    left = sum((4 - ranks[name]) * side for name, side in SIDES.items())
    assert 0 <= left < min(SIDES.values()) if rule == "budget" else max(ranks.values()) < 4


def test_passes_over_data_whose_gradients_are_not_read() -> None:
    with pytest.raises(ConfigError, match=r"init\.passes=2 would change nothing"):
        start(mode="eva", passes=2)


@torch.no_grad()
def held_out_loss(model: nn.Module, count: int = 2) -> float:
    """Mean of the model's own loss over the rows behind the first ``count``, at most the documented eight."""
    rows = [dict(Collator(0)([row])) for row in ROWS[count : count + 8]]
    return sum(float(model.eval()(**row).loss) for row in rows) / len(rows)


def tripled() -> nn.Module:
    """Its loss is not that of its head: a hook of the user's changes what the head gives."""
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: 3 * output)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize(("model", "targets"), [(llama, [*TARGETS, "lm_head"]), (tripled, ["gate_proj", "up_proj"])])
def test_the_size_of_the_step_is_that_of_the_smallest_loss_on_rows_held_out(
    model: Callable[[], nn.Module], targets: list[str]
) -> None:
    """With steps so large that those of the smallest gammas go too far."""
    adapter = {"lora_alpha": 500, "target_modules": targets}
    settings: dict[str, Any] = {"mode": "lora_one", "iters": 2, "adapter": adapter}
    losses = {g: held_out_loss(start(model=model(), stable_gamma=g, **settings).model) for g in GAMMAS}
    assert min(losses, key=losses.__getitem__) not in (GAMMAS[0], GAMMAS[-1])
    found = start(model=model(), stable_gamma="auto", **settings)
    assert found.record["stable_gamma"] == min(losses, key=losses.__getitem__)
    assert held_out_loss(found.model) == min(losses.values())


def test_rows_are_held_out_where_the_size_of_the_step_is_chosen_by_them() -> None:
    assert start(ROWS[:2], mode="lora_one", iters=2, stable_gamma=128.0).record["stable_gamma"] == 128
    with pytest.raises(DataError, match=r"init reads 2 rows .* for stable_gamma=auto a few more; there are 2"):
        start(ROWS[:2], mode="lora_one", iters=2, stable_gamma="auto")


def test_rows_whose_answers_are_cut_off() -> None:
    rows = [*ROWS[:2], Sample([1, 2, 3, 4], [-100, -100, -100, 4])]
    with pytest.raises(DataError, match=r"row 3 of the training rows has no trained token among its first 3\. Raise"):
        start(rows, mode="lora_one", iters=3, max_length=3)
    assert start(rows, mode="corda", iters=3, max_length=3).record["rows"] == 3
