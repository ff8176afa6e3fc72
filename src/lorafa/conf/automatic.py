"""Settings that are given as ``auto``: what is recommended for the model takes their place, as a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from lorafa.train.settings.run import RunConfig

AUTO = "auto"
AUTOMATIC = ("peft.r", "peft.lora_alpha", "optim.lr")
"""Settings that may be."""


def with_numbers(values: Mapping[str, Any], build: Callable[[Mapping[str, Any]], RunConfig]) -> Mapping[str, Any]:
    """Plain values of all settings, with numbers in the place of ``auto``; the config of the model is read for them.

    Args:
        build: makes a config of plain values.

    Raises:
        SourceError: the model's config cannot be had or used.
    """
    asked = [key for key in AUTOMATIC if _group(values, key).get(_name(key)) == AUTO]
    if not asked:
        return values
    from lorafa.costs.advice import ALPHA_OF_RANK, advise, facts_of  # with transformers, and only where it is asked for
    from lorafa.costs.memory import shape_of

    settled: dict[str, Any] = deepcopy(dict(values))
    for key in asked:
        del settled[key.partition(".")[0]][_name(key)]
    config = build(settled)
    shape = shape_of(config.model)
    facts = facts_of(shape.model, shape.parameters, steps=config.train.steps)
    found = {each.setting: each.value for each in advise(facts, config)}
    if "peft.r" not in asked and "peft.lora_alpha" in asked:
        found["peft.lora_alpha"] = ALPHA_OF_RANK * config.peft.r  # of the rank that is given
    for key in asked:
        if key in found:
            settled[key.partition(".")[0]][_name(key)] = found[key]
    return settled


def _group(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key.partition(".")[0])
    return found if isinstance(found, Mapping) else {}


def _name(key: str) -> str:
    return key.partition(".")[2]
