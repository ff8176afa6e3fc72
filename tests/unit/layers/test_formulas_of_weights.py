"""Formulas that calls of ``lora_A`` and ``lora_B`` do not compute go by their weights, and refuse hooks on them."""

from __future__ import annotations

import pytest
import torch

from lorafa.errors import AdapterError
from toys.adapters import VARIANT, adapted, only_layer
from toys.compare import close
from toys.layers import input_for

LINEAR = "torch.nn.modules.linear.Linear"
UNCALLED = [name for name in VARIANT if name.split(" over ")[-1] in ("bdlora", "velora", "monteclora")]


@pytest.mark.parametrize("variant", UNCALLED)
def test_a_formula_that_is_not_computed_by_calling_them_refuses_a_hook_on_them(variant: str) -> None:
    model = adapted(LINEAR, **VARIANT[variant])
    layer, x = only_layer(model), input_for(LINEAR)
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(AdapterError, match=rf"A hook is on lora_A.* called: {variant} is computed from its weight"):
        model(x)
    handle.remove()
    model(x)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("variant", UNCALLED)
def test_such_a_formula_goes_by_a_watched_dropout(variant: str, dropout: float) -> None:
    model = adapted(LINEAR, lora_dropout=dropout, **VARIANT[variant])
    layer, x, seen = only_layer(model), input_for(LINEAR), []
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, y: seen.append(y))
    torch.manual_seed(0)
    y = model(x)
    assert len(seen) == 1
    if not dropout:
        layer.lora_dropout["default"]._forward_hooks.clear()
        torch.manual_seed(0)
        close(y, model(x), torch.float32)
