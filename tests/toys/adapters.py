"""Every variant and every start on every kind of layer it goes with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.calibration.gradient import metric_root, whitening
from lorafa.initializers import INITIALIZERS, find_start
from lorafa.initializers.base import Initializer
from lorafa.layers.base import LoraLayer
from lorafa.numerics.linalg import full_svd
from lorafa.surgery.walk import lora_layers
from lorafa.variants import VARIANTS, variant_types
from toys.layers import KINDS, PARAMETERS, Single, backend_for, base_layer, weight_for

EVERY_NAME = list("aeiou0")
"""Parts of names, of which each layer here has one."""
VARIANT: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_sb": {"init_lora_weights": "lora_sb"},
    "kasa": {"init_lora_weights": "kasa"},
    "dora over lora_sb": {"use_dora": True, "init_lora_weights": "lora_sb"},
    "dora over kasa": {"use_dora": True, "init_lora_weights": "kasa"},
    "qalora": {"use_qalora": True, "qalora_group_size": 2},
    "dora over qalora": {"use_dora": True, "use_qalora": True, "qalora_group_size": 4},
    "bdlora": {"use_bdlora": {"target_modules_bd_b": EVERY_NAME, "nblocks": 2}},
    "velora": {"velora_config": {"num_groups": 4, "init_type": "random"}},
    "dora over velora": {"use_dora": True, "velora_config": {"num_groups": 3, "init_type": "random"}},
    "monteclora": {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.0}},
    "dora over monteclora": {"use_dora": True, "monteclora_config": {"num_samples": 2, "sample_scaler": 0.0}},
    "dora over bdlora": {"use_dora": True, "use_bdlora": {"target_modules_bd_a": EVERY_NAME, "nblocks": 2}},
}
"""The settings that ask for each variant, and for one over another; without noise where there is some in training."""
OTHER_SHAPES = {"qalora", "bdlora"}
"""Those that store A or B in other shapes than the dense ones."""
STARTS: list[bool | str] = [
    *(
        find_start(name).value  # type: ignore[union-attr]
        for name in INITIALIZERS.names()
        if INITIALIZERS.get(name).variant in (None, *(v for v in VARIANTS.names() if VARIANTS.get(v).stage != "gate"))
    ),
    "pissa_niter_4",
]
"""Every start that is one of the formulas of one matrix, and the one whose name has a number."""


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


def on_layer(layer: nn.Module, **settings: Any) -> PeftModel:
    """A model of this layer with an adapter that has left its start."""
    config = LoraConfig(target_modules=["layer"], **({"r": 4, "lora_alpha": 6} | settings))
    model = get_peft_model(Single(layer), config)
    train(model)
    return model


def defined(start: bool | str, kind: str) -> bool:
    """Whether the start can be made on such a layer: statistics are of linear layers, and dense ones quantized."""
    made, backend = initializer_of(start), backend_for(kind)
    if made.quantizer is not None and backend.quantized:
        return False
    return not (made.needs or made.quantizer) or backend.host == "linear"


def starts_of(variant: str, *starts: bool | str) -> list[bool | str]:
    """Those of the starts that go with a variant and its shapes; its own where that is what asks for the variant."""
    own = VARIANT[variant].get("init_lora_weights")
    if own:
        return [own]
    found = [start for start in starts if initializer_of(start).variant is None]
    other = bool(OTHER_SHAPES & set(variant.split(" over ")))
    return [start for start in found if initializer_of(start).any_shape] if other else found


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
    D = torch.randn(out, in_, generator=generator, dtype=torch.float64)  # of a teacher
    found = {"gradient": full_svd(G), "whitened_gradient": full_svd(G @ whitening(C))}
    found["teacher_change"] = full_svd(D @ metric_root(C))
    tensors = {f"{name}.{key}": value for name, svd in found.items() for key, value in svd._asdict().items()}
    _, S, Vh = full_svd(x - x.mean(0))
    tensors |= {"principal.components": Vh, "principal.singular_values": S}
    tensors |= {"output_moment.Y": G.square().mean(1), "output_moment.rows": torch.tensor(5)}
    return tensors | {"gradient.dense": G, **{f"{name}_moment.C": C for name in ("second", "exact", "corda")}}


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


def quick_first(cases: Iterable[tuple[bool | str, str, str]]) -> list[Any]:
    """Cases of (start, variant, kind of layer) as parameters, of which those that are unusual in all three are slow."""

    def slow(start: bool | str, variant: str, kind: str) -> bool:
        usual_start = start in (True, "pissa", VARIANT[variant].get("init_lora_weights"))
        return not usual_start and variant != "lora" and kind != "torch.nn.modules.linear.Linear"

    return [pytest.param(*case, marks=[pytest.mark.slow] if slow(*case) else []) for case in cases]


@torch.no_grad()
def train(model: nn.Module, size: float = 0.3) -> None:
    """Move every trainable parameter by random amounts, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))


def only_layer(model: nn.Module) -> LoraLayer:
    """The outermost adapted layer."""
    return next(layer for _, layer in lora_layers(model))
