"""Passwords and tokens that must not stand in what a run writes down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from lorafa.errors import ConfigError

MASK = "***"
SHORTEST = 8
"""Characters of a secret; what is shorter (`1`, `true`) is none, and would be masked everywhere."""
_NAMES = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[oprsu]_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Tokens of the Hub, of GitHub and of OpenAI's kind; the user and password of an address."""


def masked(value: Any) -> Any:
    """The value with ``***`` in the place of each secret in its texts.

    Secrets are the values of environment variables whose names say so (``HF_TOKEN``, ``WANDB_API_KEY``), and what has
    the shape of one.
    """
    return _masked(value, _values())


def _masked(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, MASK)
        return _SHAPES.sub(MASK, value)
    if isinstance(value, Mapping):
        return {key: _masked(inner, known) for key, inner in value.items()}
    return [_masked(inner, known) for inner in value] if isinstance(value, (list, tuple)) else value


def refuse_secrets(settings: Mapping[str, Any], within: str = "") -> None:
    """Raises ConfigError for a setting that holds a secret: all settings are recorded, and a run is continued by them.

    Args:
        settings: plain, as they are written into config.yaml.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{within}{name}.")
        elif masked(value) != (list(value) if isinstance(value, tuple) else value):
            raise ConfigError(
                f"{within}{name} holds a secret, and settings are recorded. Give it by an environment variable "
                "instead, HF_TOKEN for example, or log in where it is asked for."
            )


def _values() -> list[str]:
    """Longest first, so that no part of one stays where another stands in it."""
    named = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= SHORTEST}
    # os.path, as a long token is no name of a file and pathlib raises for it
    return sorted((value for value in named if not os.path.exists(value)), key=len, reverse=True)
