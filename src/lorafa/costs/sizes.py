"""Bytes in words."""

from __future__ import annotations


def size(number: int, digits: int = 1) -> str:
    """Bytes in MiB, with so many digits behind the point, or in GiB with two; both are powers of two."""
    return f"{number / 2**20:,.{digits}f} MiB" if number < 2**30 else f"{number / 2**30:,.2f} GiB"
