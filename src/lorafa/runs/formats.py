"""How settings were written down by earlier versions: the one place that knows it.

A run's config.yaml is a file format. Up to 0.1 a group had the settings of all its entries side by side, those of
others at a neutral value; today it has the common ones and those of the entry it names. Warm-ups and orders of rows
went by other rules (``train.rules``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafa.settings.groups import OpenGroup
from lorafa.train.settings.data import DataConfig
from lorafa.train.settings.init import InitConfig
from lorafa.train.settings.optim import OptimConfig

NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "optim": {
        "betas": ([0.9, 0.999],),
        "eps": (1e-8, 1e-6),
        "algorithm": ("exact",),
        "lr_ratio": (16.0,),
        "reg": (1e-2,),
        "damping": ("relative",),
        "prec_reg": (1e-6,),
        "form": ("adamw",),
        "X": ("sylvester",),
        "gram_damping": (1e-8,),
        "momentum": (0.0,),
    },
    "init": dict.fromkeys(
        (
            *("direction", "scale", "stable_gamma", "normalize", "step", "share_ranks", "eta", "rho", "tau", "whiten"),
            *("corda_method", "loftq_bits", "loftq_iter", "exact", "pivoted"),
        ),
        (None,),
    ),
    "data": {
        **dict.fromkeys(
            ("prompt_column", "completion_column", "subset", "revision", "templates", "cache_dir"), (None,)
        ),
        "split": ("train",),
    },
}
"""Group -> setting that every run had -> values it had where it was not read."""
_GROUPS: Mapping[str, type[OpenGroup]] = {"optim": OptimConfig, "init": InitConfig, "data": DataConfig}
_SCALES_OF_LORA_GA = {"gd": "gd_scale", "weightS": "weight_svd"}


def current(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings of a recorded run as they are written today; those of today are returned as they are.

    What is no setting of any version is left for :func:`lorafa.settings.typed.build` to refuse.
    """
    read = {str(group): dict(value) if isinstance(value, Mapping) else value for group, value in values.items()}
    for group, neutral in NEUTRAL.items():
        if isinstance(read.get(group), dict):
            read[group] = _without_unread(_GROUPS[group], read[group], neutral)
    if isinstance(read.get("train"), dict):
        read["train"].setdefault("rules", 1)
    init = read.get("init")
    if isinstance(init, dict):
        if init.get("ranks") is None and init.get("r_min") == 1:
            del init["r_min"]  # every rank is at least 1
        if str(init.get("mode")).startswith("lora_ga") and init.get("scale") in _SCALES_OF_LORA_GA:
            init["scale"] = _SCALES_OF_LORA_GA[init["scale"]]
    return read


def _without_unread(
    config_class: type[OpenGroup], values: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The values without those that stood for nothing: neutral, and of another entry or null for a start's own."""
    own = config_class.own_names(values)
    return {
        name: value
        for name, value in values.items()
        if value not in neutral.get(name, ()) or (name in own and value is not None)
    }
