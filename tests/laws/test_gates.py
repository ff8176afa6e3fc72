"""The law of gates: where a gate lets an update count, the output is that of the formula inside; elsewhere the base's.

Where a router weighs updates, all of equal weight give their mean.

That the formula inside changes the output as it changes the weight is the law of variants.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import BackendError, ConfigError
from toys.adapters import VARIANT, adapted, config_for, hosts_of, only_layer, train, with_adapter
from toys.compare import close
from toys.layers import IN, KINDS, backend_for, base_layer, input_for

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


@pytest.mark.matrix(4)
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


@pytest.mark.matrix(4)
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


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("inside", "kind", "dropout"), GATED)
def test_where_it_counts_nowhere_gradients_are_zero_and_not_missing(inside: str, kind: str, dropout: float) -> None:
    model, _ = gated(kind, torch.float64, lora_dropout=dropout, **VARIANT[inside])
    with pytest.warns(UserWarning, match=r"alora_invocation_tokens=\[3, 1\] is in no row of this call"):
        model(ROWS[2:]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and not grad.any() for grad in grads)


LINEAR_KINDS = [kind for kind in KINDS if backend_for(kind).host == "linear"]


def rounding(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a base is rounded: scales of quantized ones are float32."""
    return torch.float32 if backend_for(kind).quantized and dtype is torch.float64 else dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_router_over_adapters_adds_a_mean_of_their_changes_on_every_kind_of_linear_layer(
    kind: str, dtype: torch.dtype
) -> None:
    model = adapted(kind, dtype=dtype)
    model.add_adapter("other", config_for(kind, r=3, init_lora_weights=False))
    model.add_adapter("router", config_for(kind, arrow_config={"top_k": 2, "router_temperature": 1e15}))
    x, found = input_for(kind, dtype), {}
    for name in ("default", "other", "router"):
        model.set_adapter(name)
        found[name] = model(x)
    close(found["router"], (found["default"] + found["other"]) / 2, rounding(kind, dtype))
    assert (found["default"] - found["other"]).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_experts_in_use_alike_are_the_plain_adapter_of_their_mean_on_every_kind_of_linear_layer(
    kind: str, dtype: torch.dtype
) -> None:
    """With a router of zeros all of E experts have the weight 1 / E: (s / E) (B A - B0 A0)."""
    settings = {"init_lora_weights": "goat", "init_config": {"experts": 2, "top_k": 2, "scaling": 3.0}}
    model, x = adapted(kind, dtype=dtype, **settings), input_for(kind, dtype)
    layer = only_layer(model)
    adapter = layer.adapters["default"]
    with torch.no_grad():
        layer.lora_router["default"].weight.zero_()
        with model.disable_adapter():
            base = model(x)
        assert adapter.start is not None
        A, B, A0, B0 = (t.double() for t in (adapter.A, adapter.B, adapter.start.A, adapter.start.B))
        update = 3.0 * (B @ A / 2 - B0 @ A0)
        change = model(x).double() - base.double()
        close(change, x.double() @ update.T, rounding(kind, dtype))
    assert change.abs().max() > 0.05


@pytest.mark.parametrize("kind", [kind for kind in KINDS if backend_for(kind).host != "linear"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("goat", {"init_lora_weights": "goat", "init_config": {"experts": 2}}), ("arrow", {"arrow_config": {}})],
)
def test_a_router_is_refused_on_other_kinds_of_layer(kind: str, name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not defined on {backend_for(kind).host} layers"):
        get_peft_model(Tokens(base_layer(kind), torch.float32), config_for(kind, **settings))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if backend_for(kind).host not in ("linear", "embedding")])
def test_a_kind_of_layer_without_places_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"alora is not defined on {backend_for(kind).host} layers"):
        get_peft_model(Tokens(base_layer(kind), torch.float32), config_for(kind, alora_invocation_tokens=INVOCATION))


@pytest.mark.matrix(4)
@pytest.mark.parametrize("rows", [ROWS[:0], ROWS[:, :0]], ids=["no rows", "no tokens"])
@pytest.mark.parametrize(("inside", "kind"), sorted({(inside, kind) for inside, kind, _ in GATED}))
def test_no_rows_are_answered_by_none(inside: str, kind: str, rows: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    model, _ = gated(kind, torch.float32, **VARIANT[inside])
    y = model.train()(rows)
    assert y.shape == only_layer(model).get_base_layer()(model.vectors[rows] if "mbed" not in kind else rows).shape
    assert not [w for w in recwarn if "alora_invocation_tokens" in str(w.message)]
    if y.requires_grad:
        y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_layer_that_sees_other_rows_is_refused_by_its_name() -> None:
    class Flat(Tokens):
        def forward(self, input_ids: Tensor) -> Tensor:
            y: Tensor = self.layer(self.vectors[input_ids].flatten(0, 1))
            return y

    model = get_peft_model(
        Flat(nn.Linear(IN, 4), torch.float32), LoraConfig(target_modules=["layer"], alora_invocation_tokens=INVOCATION)
    )
    with pytest.raises(BackendError, match=r"but 'layer' gets \(18, 8\) where the model was called with 3 rows of 6"):
        model(ROWS)
