"""Where the settings of two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ELSEWHERE = ("run_dir", "if_exists", "threads")
"""Settings that two runs may differ in and still be the same run: of the place, not of the outcome."""
TRUST = "trust_remote_code"
"""One that is given each time anew, in whatever group it stands."""


def difference(name: str, now: object, then: object) -> str:
    """The first setting of a group that differs, with both values: "peft.r was 16 then and is 4 now"."""
    if not isinstance(now, Mapping) or not isinstance(then, Mapping):
        return f"{name} was {then!r} then and is {now!r} now"
    absent = "(not set)"
    key = next(key for key in (*now, *then) if key != TRUST and now.get(key, absent) != then.get(key, absent))
    return difference(f"{name}.{key}" if name else str(key), now.get(key, absent), then.get(key, absent))


def differing(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """The groups of settings in which two runs differ."""
    return [group for group in now if group not in ELSEWHERE and _compared(now[group]) != _compared(then.get(group))]


def _compared(group: Any) -> Any:
    return {key: value for key, value in group.items() if key != TRUST} if isinstance(group, Mapping) else group
