"""The law of ranks from data: a rule tells layers apart, and whatever it finds, every start can be made with it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from lorafa import LoraConfig, RankRule, initialize
from lorafa.calibration import RANK_RULES
from toys.calibration import LAYERS, Toy, inputs, loss

STARTS = ("lora_one", "lora_ga", "lora_ga_peft", "functional", "gora", "eva", "pissa", "kaiming")
WHOLE = ("gora",)
"""Starts that read whole gradients."""
SHAPES = {"first": (30, 40), "second": (30, 40), "last": (20, 30)}
ASKED = {"first": 1, "second": 4, "last": 9}
"""The ranks of the config, which a rule has to think over."""
FAR = {"explained_variance": {"rho": 2.0}, "energy": {"r_max": 40, "share": 0.999}}
"""Settings with which a rule asks for much; of the others the largest rank."""
RULES = RANK_RULES.names()
CASES = [
    *((start, rule, 1) for start in STARTS for rule in RULES),
    *((STARTS[i % len(STARTS)], RULES[i % len(RULES)], 2) for i in range(max(len(STARTS), len(RULES)))),
]
"""Every start with every rule in one pass over the data; in two passes each of them once."""


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "rule", "passes"), CASES)
def test_every_rule_ends_in_an_adapter(start: str, rule: str, passes: int) -> None:
    """With a layer's rank far below and one's far above those of the others; none starts as by default instead."""
    collecting: dict[str, Any] = {"also": ["gradient"], "passes": passes}
    if rule != "importance" and start not in WHOLE:
        collecting["dense"] = False
    config = LoraConfig(r=4, target_modules=list(LAYERS), rank_pattern=ASKED, init_lora_weights=start, init_seed=0)
    per_rank = 2 if start in ("lora_ga", "lora_ga_peft") else 1
    for settings in ({}, FAR.get(rule, {"r_max": 40})):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="The principal directions of the inputs still turn")
            adapted = initialize(Toy(), config, inputs(6), loss=loss, ranks=RankRule(rule, **settings), **collecting)
        ranks = {path: layer.r["default"] for path, layer in adapted.base_model.lora_layers()}
        assert all(1 <= rank <= min(SHAPES[name]) // per_rank for name, rank in ranks.items())
        assert len(set(ranks.values())) > 1, "the gradients and inputs of these layers differ"
        assert ranks != ASKED
        if rule == "budget":  # all of it is spent, to the last rank that fits
            left = cost_of(ASKED) - cost_of(ranks)
            assert 0 <= left < min(sum(shape) for shape in SHAPES.values())
        if rule == "explained_variance":
            assert sum(ranks.values()) == sum(ASKED.values())


def cost_of(ranks: dict[str, int]) -> int:
    """Parameters of A and B."""
    return sum(rank * sum(SHAPES[name]) for name, rank in ranks.items())
