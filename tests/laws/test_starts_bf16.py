"""The law of step 0 in half precision: a start that leaves the base's function alone gives the base's own bits.

Either one factor is zero, or s B0 A0 is subtracted as (B - B0) A + B0 (A - A0), in which every product is zero as long
as A and B are at their start: nothing is rounded, so there is nothing to differ by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapter_toys import STARTS, VARIANT, initializer_of, settings_of, starts_of, stats_for
from lorafa import LoraConfig, PeftModel, get_peft_model, initialize
from lorafa.initializers.base import LayerSpec

transformers = pytest.importorskip("transformers")

VOCABULARY = 32


class Mlp(nn.Module):
    """With and without a bias, and wide enough for the kernels of a real layer; takes (..., 48)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.up(x)))
        return y


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # transformers starts them at zero, where no rounding shows
    return model


def vectors(rows: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, 48, dtype=torch.bfloat16)}


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(VOCABULARY, (rows, length))}


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["input_ids"]} if "input_ids" in batch else batch


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    return found.float().square().mean() if isinstance(found, Tensor) else found.loss


Toy = tuple[Callable[[], nn.Module], list[str], Callable[[int, int], dict[str, Tensor]]]
TOYS: dict[str, Toy] = {
    "mlp": (Mlp, ["up", "down"], vectors),
    "llama": (llama, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"], tokens),
}


def started(start: bool | str, toy: str, **settings: Any) -> tuple[nn.Module, PeftModel]:
    """A bfloat16 model, and a copy with a fresh adapter, from data where the start reads data."""
    make, targets, rows = TOYS[toy]
    base = make().bfloat16().eval()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_seed=0, **settings_of(start), **settings)
    model = copy.deepcopy(base)
    if initializer_of(start).needs:
        data = [labelled(rows(2, 12)) for _ in range(4)]
        return base, initialize(model, config, data, loss=loss).eval()
    return base, get_peft_model(model, config).eval()


def outputs(base: nn.Module, model: nn.Module, toy: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Of both, at sizes that take different kernels."""
    for size in ((1, 1), (2, 7), (8, 33)):
        batch = TOYS[toy][2](*size)
        pair = [run(**batch) for run in (base, model)]
        yield tuple(found if isinstance(found, Tensor) else found.logits for found in pair)


def promises_bits(start: bool | str) -> bool:
    """Whether it keeps the function by a product that is zero term by term; orthogonal factors give one that adds up to
    zero, up to rounding."""
    made, weight = initializer_of(start), torch.randn(24, 16)
    config = LoraConfig(**settings_of(start))
    result = made(weight, stats_for(weight), LayerSpec("layer", "linear", 4, 1.5, 0, settings=config.start_settings()))
    nothing = result.subtract_from_base or not result.A.any() or not result.B.any()
    return made.keeps_function and nothing


PROMISED = [start for start in STARTS if promises_bits(start)]


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize(("start", "variant"), [(s, v) for v in VARIANT for s in starts_of(v, *STARTS)])
def test_outputs_are_the_bits_of_the_base_where_the_start_promises_it(
    start: bool | str, toy: str, variant: str
) -> None:
    formula = {} if initializer_of(start).variant else VARIANT[variant]
    base, model = started(start, toy, **formula)
    if start in PROMISED:
        for theirs, ours in outputs(base, model, toy):
            assert torch.equal(ours, theirs)
    elif initializer_of(start).keeps_function:
        for theirs, ours in outputs(base, model, toy):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    else:
        assert any(not torch.equal(ours, theirs) for theirs, ours in outputs(base, model, toy))


@pytest.mark.parametrize("start", PROMISED)
def test_under_autocast_and_merged_they_are_too(start: bool | str) -> None:
    base, model = started(start, "mlp")
    for wide in (base, model):
        wide.float()
    with torch.autocast("cpu", torch.bfloat16):
        for theirs, ours in outputs(base, model, "mlp"):
            assert ours.dtype is torch.bfloat16
            assert torch.equal(ours, theirs)
    base, model = started(start, "mlp")
    merged = model.merge_and_unload()
    assert all(torch.equal(value, merged.state_dict()[key]) for key, value in base.state_dict().items())
