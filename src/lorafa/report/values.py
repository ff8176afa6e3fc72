"""Recorded values as text, and nested ones laid flat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their dotted names; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(written, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_measure(value: Any) -> bool:
    """Whether a recorded value says how good something is; counts (of tokens, texts, answers) are recorded as integers,
    and compare nothing."""
    return isinstance(value, float)
