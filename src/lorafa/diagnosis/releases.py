"""Which of two versions of a package is older."""

from __future__ import annotations

import re

_PARTS = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)?", re.IGNORECASE)


def release(version: str) -> tuple[tuple[int, ...], int] | None:
    """A version as something that can be compared: numbers without zeros at their end, and 0 for one before the release
    (2.6.0rc1, 2.6.0a0+git), else 1. None where it is no version.

    What stands behind a plus is passed over, and so are epochs, which none of the packages here has.
    """
    found = _PARTS.match(version.strip())
    if found is None:
        return None
    numbers = [int(part) for part in found[1].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers), 0 if found[2] else 1


def is_older(version: str, than: str) -> bool:
    """Whether one version is older than another; False where one of them is no version."""
    one, other = release(version), release(than)
    return one is not None and other is not None and one < other
