"""Text that others wrote, read in bounded time and depth: whatever it holds, the only error is a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorafa.errors import ConfigError, first_line

DEPTH, VALUES = 64, 100_000
"""How deep a yaml text may nest, and how many values it may stand for once its references are written out."""


def from_json(text: str | bytes) -> Any:
    """The value of a json text.

    Raises:
        ValueError: it is no json, nests too deep, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def from_yaml(text: str) -> Any:
    """The value of a yaml text of plain values.

    Raises:
        ValueError: it is no yaml, nests too deep, stands for too much, or holds a date or a number that is none.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, which a page of 100 runs shows
    try:
        depth = 0
        events = yaml.parse(text, Loader=loader)  # stops in time: the loaders take the stack, or quadratic time
        for count, event in enumerate(events):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise ValueError(f"it nests more than {DEPTH} deep")
            if count > VALUES:  # each takes a kilobyte, and ten microseconds
                raise ValueError(f"it has more than {VALUES} values")
        value = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, RecursionError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(first_line(error)) from error
    _require_few(value)
    return value


def _require_few(value: Any) -> None:
    """Raises ValueError where references make a short text stand for very much, or for itself."""
    left, waiting = VALUES, [value]
    while waiting:
        one = waiting.pop()
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple, set)) else ()
        left -= len(inner)
        if left < 0:
            raise ValueError(f"it stands for more than {VALUES} values")
        waiting.extend(inner)


def read_yaml(path: str | Path, advice: str) -> Any:
    """The value in a yaml file.

    Args:
        advice: what to do where it cannot be read, the end of the error text.

    Raises:
        ConfigError: it cannot be read, or is no yaml.
    """
    try:
        return from_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}. {advice}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not yaml: {first_line(error)}. {advice}") from error
