"""Recorded values as text, and nested ones laid flat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their dotted names; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def written(value: Any, form: str = ".6g") -> str:
    """A value as it is typed on the command line.

    Args:
        form: how a number that is no integer is written; an empty text: with all its digits, and a point.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(written(each, form) for each in value) + "]"
    return f"{value:{form}}" if isinstance(value, float) else str(value)


def number(value: float | None, form: str = ".4g") -> str:
    """A number as a cell of a table; a dash for none."""
    return "-" if value is None else f"{value:{form}}"


def is_measure(value: Any) -> bool:
    """Whether a recorded value says how good something is; counts (of tokens, texts, answers) are recorded as integers,
    and compare nothing."""
    return isinstance(value, float)


def is_number(value: Any) -> bool:
    """Whether a recorded value is a measure or a count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: Any) -> Any:
    """The same for JSON, which knows no infinite numbers."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
