"""Patterns of names in configs: what ``rank_pattern`` and ``alpha_pattern`` say of a layer, and ones for it alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from lorafa.config import LoraConfig

Number = TypeVar("Number", int, float)


def key_of(table: Collection[str], name: str) -> str | None:
    """The first key of ``rank_pattern`` or ``alpha_pattern`` that is the end of a full name, or a regular expression
    for it; None where there is none."""
    return next((key for key in table if re.match(rf"(.*\.)?({key})$", name)), None)


def lookup(table: Mapping[str, Number], name: str, usual: Number) -> Number:
    """What a table of patterns says of a layer (:func:`key_of`); ``usual`` where it says nothing."""
    key = key_of(table, name)
    return usual if key is None else table[key]


def numbers_of(config: LoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of a layer, or of a parameter, by its full name."""
    return lookup(config.rank_pattern, name, config.r), lookup(config.alpha_pattern, name, config.lora_alpha)


def exactly(name: str) -> str:
    """A key of ``rank_pattern`` or ``alpha_pattern`` that means this full name, and no longer one that ends in it."""
    return f"^{re.escape(name)}"


def any_of(names: Collection[str]) -> str:
    """``target_modules`` that mean modules of these full names, and none whose name ends in one."""
    return "|".join(map(re.escape, sorted(names)))
