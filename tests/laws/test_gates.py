"""The law of gates: where a gate lets an update count, the output is that of the formula inside; elsewhere the base's.

That the formula inside changes the output as it changes the weight is the law of variants.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import BackendError, ConfigError
from toys.adapters import VARIANT, config_for, hosts_of, train, with_adapter
from toys.compare import close
from toys.layers import IN, KINDS, backend_for, base_layer

INVOCATION = [3, 1]
ROWS = torch.tensor([[5, 3, 1, 3, 1, 6], [3, 1, 5, 6, 7, 0], [5, 6, 3, 3, 2, 1]])
COUNTS = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
"""From the last occurrence on, and nowhere in a row without one."""
GATED = [
    (inside, kind, dropout)
    for inside in VARIANT
    for kind in KINDS
    for dropout in (0.0, 0.3)
    if backend_for(kind).host in hosts_of(inside) & {"linear", "embedding"}
]


class Tokens(nn.Module):
    """One layer on the embedded tokens, or on the tokens themselves where it is an embedding."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.looks_up = isinstance(layer, nn.Embedding)
        self.register_buffer("vectors", torch.randn(8, IN, dtype=torch.float64).to(dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.layer(input_ids if self.looks_up else self.vectors[input_ids])
        return y


def gated(kind: str, dtype: torch.dtype, **settings: Any) -> tuple[PeftModel, PeftModel]:
    """A model with a gated adapter, and one with the same adapter without the gate."""
    models = []
    for tokens in (INVOCATION, None):
        torch.manual_seed(0)
        model = Tokens(base_layer(kind, dtype=dtype), dtype)
        models.append(with_adapter(model, kind, alora_invocation_tokens=tokens, **settings))
        torch.manual_seed(1)
        train(models[-1])
    return models[0], models[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inside", "kind"), sorted({(inside, kind) for inside, kind, _ in GATED}))
def test_the_output_is_that_of_the_formula_inside_where_it_counts_and_of_the_base_elsewhere(
    inside: str, kind: str, dtype: torch.dtype
) -> None:
    model, always = gated(kind, dtype, **VARIANT[inside])
    with torch.no_grad():
        with model.disable_adapter():
            base = model(ROWS)
        out, everywhere = model(ROWS), always(ROWS)
    assert torch.equal(out[~COUNTS], base[~COUNTS]), "to the bit"
    close(out[COUNTS], everywhere[COUNTS], dtype)
    assert (everywhere[COUNTS] - base[COUNTS]).abs().max() > 0.05


@pytest.mark.parametrize(("inside", "kind", "dropout"), GATED)
def test_gradients_are_those_of_the_places_where_it_counts(inside: str, kind: str, dropout: float) -> None:
    model, always = gated(kind, torch.float64, lora_dropout=dropout, **VARIANT[inside])
    probe = torch.randn(3, 6, model(ROWS).shape[-1], dtype=torch.float64)
    if dropout:  # other masks are drawn for fewer rows, so that only what no mask changes can be compared
        (model(ROWS) * probe)[~COUNTS].sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        return
    (model(ROWS) * probe).sum().backward()
    (always(ROWS) * probe)[COUNTS].sum().backward()
    for (name, mine), (_, theirs) in zip(model.named_parameters(), always.named_parameters(), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None, name
            assert theirs.grad is not None, name
            tolerance = 1e-5 if backend_for(kind).quantized else 1e-10  # scales are float32
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_where_it_counts_nowhere_gradients_are_zero_and_not_missing() -> None:
    model, _ = gated("torch.nn.modules.linear.Linear", torch.float64)
    with pytest.warns(UserWarning, match=r"alora_invocation_tokens=\[3, 1\] is in no row of this call"):
        model(ROWS[2:]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if backend_for(kind).host not in ("linear", "embedding")])
def test_a_kind_of_layer_without_places_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"alora is not defined on {backend_for(kind).host} layers"):
        get_peft_model(Tokens(base_layer(kind), torch.float32), config_for(kind, alora_invocation_tokens=INVOCATION))


def test_a_layer_that_sees_other_rows_is_refused_by_its_shape() -> None:
    class Flat(Tokens):
        def forward(self, input_ids: Tensor) -> Tensor:
            y: Tensor = self.layer(self.vectors[input_ids].flatten(0, 1))
            return y

    model = get_peft_model(
        Flat(nn.Linear(IN, 4), torch.float32), LoraConfig(target_modules=["layer"], alora_invocation_tokens=INVOCATION)
    )
    with pytest.raises(BackendError, match=r"a layer gets \(18, 8\) where the model was called with 3 rows of 6"):
        model(ROWS)
