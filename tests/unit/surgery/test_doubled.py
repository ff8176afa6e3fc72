"""s B A - s B0 A0 as one LoRA of twice the rank: the same product, under the same scaling on every layer."""

from __future__ import annotations

from typing import Any

import pytest

from lorafa import LoraConfig
from lorafa.surgery.doubled import doubled, stacked_start
from lorafa.surgery.plain import exact_factors
from lorafa.surgery.walk import lora_layers
from toys.compare import close
from toys.swaps import adapted

PATTERNS: dict[str, Any] = {"rank_pattern": {"second": 3}, "alpha_pattern": {"second": 7}}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [{}, PATTERNS], ids=["", "patterns"])
def test_twice_the_rank_has_the_scaling_and_the_update_there_was(rslora: bool, patterns: dict[str, Any]) -> None:
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "init_lora_weights": "pissa", **patterns}
    model = adapted(**settings)
    config = doubled(model.peft_config["default"])
    assert (config.r, config.init_lora_weights) == (8, True)
    for path, layer in lora_layers(model.get_base_model()):
        adapter, start = layer.adapters["default"], layer.adapters["default"].start
        rank = config.rank_pattern.get(path, config.r)
        alpha = config.alpha_pattern.get(path, config.lora_alpha)
        assert rank == 2 * adapter.rank
        scaling = alpha / (rank**0.5 if rslora else rank)
        assert scaling == pytest.approx(float(adapter.scaling), rel=1e-15)
        wanted = adapter.scaling * (adapter.B @ adapter.A - start.B @ start.A)
        for A, B in (stacked_start(layer, "default"), exact_factors(layer, "default"), adapter.factors):
            assert (A.shape[0], B.shape[1]) == (rank, rank)
            close(scaling * B @ A, wanted, 1e-13)


def test_a_config_is_doubled_and_stays_as_it_was() -> None:
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"a": 5}, alpha_pattern={"a": 7})
    made = doubled(config)
    assert (made.r, made.lora_alpha, made.rank_pattern) == (4, pytest.approx(3 * 2**0.5), {"a": 10})
    assert made.alpha_pattern == {"a": pytest.approx(7 * 2**0.5)}
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 3, {"a": 5}, {"a": 7})
