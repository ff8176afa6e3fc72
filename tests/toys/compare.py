"""What is compared: values up to rounding, and all there is to know of a model before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa.errors import LoraError

EXACT = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Tolerance of a comparison of a few dozen terms of size 1, by dtype."""


@contextmanager
def refused(model: nn.Module, kind: type[LoraError], text: str) -> Iterator[None]:
    """The block raises just ``kind``, with ``text`` (an expression) in it, and the model is bit-identical after it."""
    before = everything(model)
    with pytest.raises(kind, match=text) as caught:
        yield
    assert type(caught.value) is kind
    assert_unchanged(before, model)


def close(actual: Tensor, expected: Tensor, tolerance: torch.dtype | float = torch.float64) -> None:
    """Equal up to rounding: that of a dtype for values of size 1, or a share of each value and of the largest one."""
    if isinstance(tolerance, torch.dtype):
        relative = absolute = EXACT[tolerance]
    else:
        relative, absolute = tolerance, tolerance * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute, check_dtype=False)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_bits(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name])


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, by torch's own decomposition."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all its values by name; those of tensors that are made of others part by part."""
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        names = value.__tensor_flatten__()[0] if type(value).__module__.startswith("torchao") else ()
        found |= {f"{key}.{name}": getattr(value, name).clone() for name in names} or {key: value.clone()}
    return found


def everything(model: nn.Module) -> dict[str, Any]:
    """All there is to know of a model: values, which Parameter objects, which modules, what trains, in which mode."""
    return {
        "values": values_of(model),
        "objects": {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)},
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "trains": {key: value.requires_grad for key, value in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = everything(model)
    values, now = before["values"], after["values"]
    assert values.keys() == now.keys()
    assert all(torch.equal(values[key], now[key]) and values[key].dtype == now[key].dtype for key in values)
    for aspect in before.keys() - {"values"}:
        assert before[aspect] == after[aspect], aspect
