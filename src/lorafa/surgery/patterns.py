"""Patterns of names in configs: what ``rank_pattern`` and ``alpha_pattern`` say of a layer, and ones for it alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from lorafa.config import LoraConfig
from lorafa.settings.expressions import END, expressions

Number = TypeVar("Number", int, float)


def key_of(table: Collection[str], name: str, field: str = "rank_pattern") -> str | None:
    """The first key of ``rank_pattern`` or ``alpha_pattern`` that is the end of a full name, or a regular expression
    for it; None where there is none.

    Raises:
        ConfigError: they take too long.
    """
    if not table:
        return None
    keys = tuple(table)
    index = expressions(field, keys, END).first(name)
    return None if index is None else keys[index]


def lookup(table: Mapping[str, Number], name: str, usual: Number, field: str = "rank_pattern") -> Number:
    """What a table of patterns says of a layer (:func:`key_of`); ``usual`` where it says nothing."""
    key = key_of(table, name, field)
    return usual if key is None else table[key]


def numbers_of(config: LoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of a layer, or of a parameter, by its full name."""
    rank = lookup(config.rank_pattern, name, config.r)
    return rank, lookup(config.alpha_pattern, name, config.lora_alpha, "alpha_pattern")


def exactly(name: str) -> str:
    """A key of ``rank_pattern`` or ``alpha_pattern`` that means this full name, and no longer one that ends in it."""
    return f"^{re.escape(name)}"


def any_of(names: Collection[str]) -> str:
    """``target_modules`` that mean modules of these full names, and none whose name ends in one."""
    return "|".join(map(re.escape, sorted(names)))
