"""The law of step 0 in half precision: a start that leaves the base's function alone gives the base's own bits.

Either one factor is zero, or s B0 A0 is subtracted as (B - B0) A + B0 (A - A0), in which every product is zero as long
as A and B are at their start: nothing is rounded, so there is nothing to differ by.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, initialize
from lorafa.spec import LayerSpec
from toys.adapters import STARTS, VARIANT, initializer_of, settings_of, starts_of, stats_for, train

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


def started(start: bool | str, toy: str, *, narrow: bool = False, **settings: Any) -> tuple[nn.Module, PeftModel]:
    """A bfloat16 model, and a copy with a fresh adapter, from data where the start reads data.

    Args:
        narrow: keep A and B in bfloat16 too.
    """
    make, targets, rows = TOYS[toy]
    base = make().bfloat16().eval()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_seed=0, **settings_of(start), **settings)
    model = copy.deepcopy(base)
    if initializer_of(start).complete:  # reads a teacher's files, too
        named = [(name, each) for name, each in model.named_modules() if name.rpartition(".")[2] in targets]
        stats = {name: stats_for(each.weight) for name, each in named}  # type: ignore[arg-type]
        return base, get_peft_model(model, config, stats=stats, autocast_adapter_dtype=not narrow).eval()
    if initializer_of(start).needs:
        data = [labelled(rows(2, 12)) for _ in range(4)]
        return base, initialize(model, config, data, loss=loss, autocast_adapter_dtype=not narrow).eval()
    return base, get_peft_model(model, config, autocast_adapter_dtype=not narrow).eval()


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


def dtypes(model: PeftModel) -> set[torch.dtype]:
    """Of all that belongs to its adapter, frozen starts and magnitudes too."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {tensor.dtype for name, tensor in tensors if "lora_" in name}


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("toy", "narrow"), [("mlp", False), ("llama", False), ("mlp", True)])
@pytest.mark.parametrize(("start", "variant"), [(s, v) for v in VARIANT for s in starts_of(v, *STARTS)])
def test_outputs_are_the_bits_of_the_base_where_the_start_promises_it(
    start: bool | str, toy: str, narrow: bool, variant: str
) -> None:
    """Also where A and B are rounded to bfloat16: what is subtracted is the product of the rounded ones."""
    formula = {} if initializer_of(start).variant else VARIANT[variant]
    base, model = started(start, toy, narrow=narrow, **formula)
    assert dtypes(model) == {torch.bfloat16 if narrow else torch.float32}
    if start in PROMISED:
        for theirs, ours in outputs(base, model, toy):
            assert torch.equal(ours, theirs)
    elif initializer_of(start).keeps_function:
        for theirs, ours in outputs(base, model, toy):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    else:
        assert any(not torch.equal(ours, theirs) for theirs, ours in outputs(base, model, toy))


ON_THE_BASE = [start for start in STARTS if initializer_of(start).quantizer is None]
"""Starts whose adapter sits on the base as it was."""


@pytest.mark.parametrize("start", ON_THE_BASE)
def test_factors_in_half_precision_are_plain_lora_on_the_base_as_it_was(start: bool | str, tmp_path: Path) -> None:
    """Compared in float32, where the bfloat16 factors are exact. With a matrix between B and A the file has their
    product, rounded."""
    base, model = started(start, "mlp", narrow=True)
    train(model, 0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).eval()
    assert dtypes(again) == {torch.bfloat16}
    x = vectors(2, 7)
    assert not torch.allclose(model(**x), base(**x), atol=1e-2)
    assert torch.equal(again(**x), model(**x))
    wide, x = base.float(), {"x": x["x"].float()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(wide, tmp_path).eval()
    tolerance = 2e-2 if initializer_of(start).variant else 1e-5
    torch.testing.assert_close(theirs(**x), model.float()(**x), rtol=tolerance, atol=tolerance)


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
