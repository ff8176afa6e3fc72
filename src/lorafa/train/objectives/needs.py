"""TRL: whether it is there, in a version whose trainers are known here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from lorafa.errors import ConfigError

LOWEST, BELOW = "1.16.0", "1.17"
"""The versions that are tested; pyproject.toml's extra ``trl`` asks for the same."""


def require_trl(objective: str) -> None:
    """Raises ConfigError where TRL is not there, or another version of it."""
    wanted = f'pip install "lorafa[trl]" (trl>={LOWEST},<{BELOW}, for Python 3.11 and newer)'
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ConfigError(
            f"objective={objective} trains by TRL, which is not installed. Install it: {wanted}. objective=sft needs "
            "nothing."
        ) from error
    try:
        fits = Version(LOWEST) <= Version(found) < Version(BELOW)
    except InvalidVersion:
        fits = False
    if not fits:
        raise ConfigError(
            f"objective={objective} trains by TRL {LOWEST} to below {BELOW}, found trl {found}, whose trainers may do "
            f"something else. Install one that fits: {wanted}."
        )
