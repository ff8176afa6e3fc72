"""Starts from data beside PEFT's, on a tiny Llama over the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lorafa
from toys.parity import quiet

transformers = pytest.importorskip("transformers")
TARGETS = ["q_proj", "o_proj", "down_proj"]
RANK = 3


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(40, (4, 20), generator=generator) for _ in range(4)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def settings(start: str, **own: Any) -> dict[str, Any]:
    return {"r": RANK, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": start, **own}


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(found) == 12
    return found


def products(model: nn.Module) -> dict[str, Tensor]:
    """B A of every layer."""
    all_factors = factors(model)
    names = [name for name in all_factors if "lora_A" in name]
    return {name: all_factors[name.replace("lora_A", "lora_B")] @ all_factors[name] for name in names}


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Of A and B entry by entry: the sign of a singular vector is anybody's."""
    return {name: value.abs() for name, value in factors(model).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert float((ours[name] - wanted).norm() / wanted.norm()) < tolerance, name


def gradient_pass(model: nn.Module, batches: list[dict[str, Tensor]]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    return run


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit", "weight_svd"])
def test_the_compatibility_preset_of_lora_ga_starts_where_peft_does(
    base: nn.Module, batches: list[dict[str, Tensor]], direction: str, scale: str
) -> None:
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    own = {"direction": direction, "scale": scale}
    with quiet():
        config = peft.LoraConfig(**settings("lora_ga", lora_ga_config=peft.LoraGAConfig(**own)))
        preprocess_loraga(theirs, config, gradient_pass(theirs, batches))
        adapted = peft.get_peft_model(theirs, config)
    mine = lorafa.LoraConfig(**settings("lora_ga_peft", lora_ga_config=lorafa.LoraGAConfig(**own)))
    lorafa.preprocess_loraga(ours, mine, gradient_pass(ours, batches))
    tolerance = 2e-2 if scale == "weight_svd" else 1e-3  # PEFT estimates the largest singular value of W
    assert_same(magnitudes(lorafa.get_peft_model(ours, mine)), magnitudes(adapted), tolerance)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_where_peft_does(base: nn.Module, batches: list[dict[str, Tensor]], method: str) -> None:
    """On one sample: PEFT divides each by |max X|, we by max |X| as the paper does, and a common factor changes
    nothing."""
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    one = torch.cat([batch["input_ids"].reshape(1, -1) for batch in batches], dim=1)[:, :100]

    def run(model: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                model(input_ids=one)

        return forward

    with quiet():
        config = peft.LoraConfig(
            **settings("corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method))
        )
        preprocess_corda(theirs, config, run_model=run(theirs))
        adapted = peft.get_peft_model(theirs, config)
    mine = lorafa.LoraConfig(**settings("corda", corda_config=lorafa.CordaConfig(corda_method=method)))
    lorafa.preprocess_corda(ours, mine, run_model=run(ours))
    assert_same(products(lorafa.get_peft_model(ours, mine)), products(adapted), 2e-2)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_the_directions_and_ranks_peft_finds(
    base: nn.Module, batches: list[dict[str, Tensor]], rho: float
) -> None:
    found = {}
    for library in (peft, lorafa):
        model = copy.deepcopy(base)
        config = library.LoraConfig(
            **settings("eva", eva_config=library.EvaConfig(rho=rho, tau=0.999), task_type="CAUSAL_LM")
        )
        with quiet():
            found[library] = library.get_eva_state_dict(model, batches, config, show_progress_bar=False)
    ours, theirs = found[lorafa], found[peft]
    assert {name: len(A) for name, A in ours.items()} == {name: len(A) for name, A in theirs.items()}
    for name, A in theirs.items():
        overlap = torch.linalg.svdvals(ours[name].double() @ A.double().mT)
        assert float(overlap.min()) > 0.95, name  # both stop as soon as directions have settled to tau
