"""Small models with one adapted layer of every kind there is, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.backends import BACKENDS
from lorafa.backends.base import Backend
from lorafa.backends.parameter import ParameterBackend
from lorafa.calibration.gradient import whitening
from lorafa.initializers import INITIALIZERS, find_start
from lorafa.initializers.base import Initializer
from lorafa.layers.base import LoraLayer
from lorafa.numerics.linalg import full_svd
from lorafa.surgery.walk import lora_layers
from lorafa.variants import VARIANTS, variant_types

OUT, IN = 24, 8
"""Of every layer here: nn.MultiheadAttention needs out = 3 in, and in must be even for a kernel of two taps."""
PARAMETERS = ("matrix parameter", "experts (E, out, in)", "experts (E, in, out)")
KINDS = (*BACKENDS.names(), *PARAMETERS)
VARIANT: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_sb": {"init_lora_weights": "lora_sb"},
    "kasa": {"init_lora_weights": "kasa"},
    "dora over lora_sb": {"use_dora": True, "init_lora_weights": "lora_sb"},
    "dora over kasa": {"use_dora": True, "init_lora_weights": "kasa"},
}
"""The settings that ask for each variant, and for one over another."""
STARTS: list[bool | str] = [
    *(
        find_start(name).value  # type: ignore[union-attr]
        for name in INITIALIZERS.names()
        if INITIALIZERS.get(name).variant in (None, *VARIANTS.names())
    ),
    "pissa_niter_4",
]
"""Every start there is a formula for, and the one whose name has a number."""
EXACT = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Tolerance of a comparison of a few dozen terms of size 1, by dtype."""


class Experts(nn.Module):
    """x (E, T, in) -> (E, T, out), each expert with its own matrix; x (T, in) for a single matrix."""

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(weight.mT.contiguous() if transposed else weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.is_transposed else self.weight.mT)


class Single(nn.Module):
    """A model of one layer, called as its kind is called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.attends = isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x)[0] if self.attends else self.layer(x)
        return y


def weight_for(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random weight (out, in), or a stack of three."""
    experts = (3,) if kind.startswith("experts") else ()
    return torch.randn(*experts, OUT, IN, dtype=torch.float64).to(dtype) / IN**0.5


def backend_for(kind: str) -> Backend:
    return ParameterBackend("weight") if kind in PARAMETERS else BACKENDS.get(kind)()


def base_layer(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of the kind; skips where its optional package is not installed."""
    weight = weight_for(kind, dtype)
    if kind in PARAMETERS:
        return Experts(weight, transposed=kind == "experts (E, in, out)")
    try:
        return backend_for(kind).example(weight, torch.randn(OUT).to(dtype) if bias else None)
    except ImportError as error:
        pytest.skip(f"{kind}: {error}")


def input_for(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input the layer takes."""
    host = backend_for(kind).host
    if host == "embedding":
        return torch.randint(IN, (5, 7))
    shape = {"linear": (5, 7, IN), "attention": (2, 5, IN), "experts": (3, 5, IN)}.get(host)
    if host == "conv":
        dims = backend_for(kind).dims  # type: ignore[attr-defined]
        shape = (3, IN // 2, 6, *(3,) * (dims - 1))
    if kind == "matrix parameter":
        shape = (5, IN)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def config_for(kind: str, **settings: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "init_seed": 3} | settings
    settings = settings_of(settings.get("init_lora_weights", True)) | settings
    if kind in PARAMETERS:
        return LoraConfig(target_modules=[], target_parameters=["layer.weight"], **settings)
    return LoraConfig(target_modules=["layer"], **settings)


def read_by(start: bool | str, stats: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
    """The statistics for a start that reads some, None for the others, which are refused any."""
    return stats if initializer_of(start).needs else None


def settings_of(start: bool | str) -> dict[str, Any]:
    """The start with the settings that it does not go without: as in PEFT, LoftQ's are to be given."""
    return {"init_lora_weights": start} | ({"loftq_config": {"loftq_iter": 2}} if start == "loftq" else {})


def with_adapter(model: nn.Module, kind: str, **settings: Any) -> PeftModel:
    """The model of one layer with a fresh adapter."""
    config, stats = config_for(kind, **settings), {"layer": stats_for(weight_for(kind))}
    return get_peft_model(model, config, stats=read_by(config.init_lora_weights, stats))


def adapted(
    kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, trained: bool = True, **settings: Any
) -> PeftModel:
    """A model of one layer of the kind with an adapter on it, moved away from its start if ``trained``."""
    model = with_adapter(Single(base_layer(kind, bias=bias, dtype=dtype)), kind, **settings)
    if trained:
        train(model)
    return model


def defined(start: bool | str, kind: str) -> bool:
    """Whether the start can be made on such a layer: statistics are of linear layers, and dense ones quantized."""
    made, backend = initializer_of(start), backend_for(kind)
    if made.quantizer is not None and backend.quantized:
        return False
    return not (made.needs or made.quantizer) or backend.host == "linear"


def starts_of(variant: str, *starts: bool | str) -> list[bool | str]:
    """Those of the starts that go with a variant; its own where that is what asks for the variant."""
    own = VARIANT[variant].get("init_lora_weights")
    return [own] if own else [start for start in starts if initializer_of(start).variant is None]


def with_starts(cases: list[tuple[str, str]], *starts: bool | str) -> list[tuple[str, str, bool | str]]:
    """Each (variant, kind) with those of the starts that go with the variant, or with its own."""
    return [(variant, kind, start) for variant, kind in cases for start in starts_of(variant, *starts)]


def initializer_of(start: bool | str) -> Initializer:
    return INITIALIZERS.get(find_start(start).name)  # type: ignore[union-attr]


def stats_for(weight: Tensor) -> dict[str, Tensor]:
    """Every statistic a start may read, of random inputs and a random gradient, for a weight (out, in)."""
    out, in_ = weight.shape[-2:]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(50, in_, generator=generator, dtype=torch.float64)
    G = torch.randn(out, in_, generator=generator, dtype=torch.float64)
    C = x.mT @ x / len(x)
    found = {"gradient": full_svd(G), "whitened_gradient": full_svd(G @ whitening(C))}
    tensors = {f"{name}.{key}": value for name, svd in found.items() for key, value in svd._asdict().items()}
    _, S, Vh = full_svd(x - x.mean(0))
    tensors |= {"principal.components": Vh, "principal.singular_values": S}
    return tensors | {"gradient.dense": G, "second_moment.C": C, "corda_moment.C": C}


def hosts_of(variant: str) -> frozenset[str]:
    """Kinds of layer that a variant is defined on, with what it is over."""
    types = variant_types(LoraConfig(**VARIANT[variant]))
    return frozenset.intersection(*(one.hosts for one in types))


DEFINED = [(v, k) for v in VARIANT for k in KINDS if backend_for(k).host in hosts_of(v)]
"""(variant, kind of layer) where the formula is defined."""
STARTED = [(s, v, k) for v, k in DEFINED for s in starts_of(v, *STARTS) if defined(s, k)]
"""(start, variant, kind of layer) where all three go together."""
STARTED_AT_BASE = [case for case in STARTED if initializer_of(case[0]).keeps_function]
"""Those that compute the function of the base at step 0."""


@torch.no_grad()
def train(model: nn.Module, size: float = 0.3) -> None:
    """Move every trainable parameter by random amounts, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))


def only_layer(model: nn.Module) -> LoraLayer:
    """The outermost adapted layer."""
    return next(layer for _, layer in lora_layers(model))


def everything(model: nn.Module) -> dict[str, Any]:
    """All there is to know of a model: values, which Parameter objects, which modules, what trains, in which mode."""
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
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


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    tolerance = EXACT[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


Function = Callable[..., Any]
