"""Checks of single settings, shared by every config: each raises a ConfigError that says what to pass instead."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import Any, TypeVar

from lorafa.errors import ConfigError, bounded, did_you_mean, refuse

T = TypeVar("T")


def found(value: object) -> str:
    """``'8' (str)``: the value and its type, for the middle of an error text."""
    return f"{shown(value)} ({type(value).__name__})"


def shown(value: object) -> str:
    """The value as Python writes it, cut where it is long, or a word for it where it cannot be written."""
    try:
        return bounded(repr(value), 500)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        return "what is too long to be shown"


def repeated(values: Iterable[T]) -> list[T]:
    """What occurs more than once, in its order: however many values there are, each is looked at once."""
    return [value for value, count in Counter(values).items() if count > 1]


def is_int(value: object) -> bool:
    """True for integers; ``True`` and ``False`` are not integers here."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, found {found(value)}.")


def check_int(name: str, value: Any, *, at_least: int | None = None) -> None:
    bound = "" if at_least is None else f" >= {at_least}"
    if is_int(value) and abs(value) >= 2**64:
        raise ConfigError(f"{name} must be an integer of at most 64 bits, found {found(value)}. Pass a smaller one.")
    if not is_int(value) or (at_least is not None and value < at_least):
        raise ConfigError(f"{name} must be an integer{bound}, found {found(value)}. {_as_int(name, value, at_least)}")


def _as_int(name: str, value: object, at_least: int | None) -> str:
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        number = None
    lowest = 1 if at_least is None else at_least
    if number is None or number < lowest or isinstance(value, bool):
        return f"Pass a number such as {max(lowest, 8)}, without quotes."
    return f"Pass {number} if that is what was meant." if "[" in name else f"Pass {name}={number} if that is meant."


def check_number(name: str, value: Any, what: str, low: float, high: float = math.inf, *, closed: str = "") -> None:
    """Check a finite number in an interval.

    Args:
        what: the condition in words, for the error text: "a probability in [0, 1)".
        closed: which ends belong to the interval: "[" the lower one, "]" the upper one, "[]" both.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise ConfigError(f"{name} must be {what}, found {found(value)}. Pass a finite number.")
    if not (value > low or ("[" in closed and value == low)) or not (value < high or ("]" in closed and value == high)):
        raise ConfigError(f"{name} must be {what}, found {shown(value)}. Pass a number in that range.")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def check_rate(name: str, value: Any) -> None:
    """A learning rate."""
    check_number(name, value, "a number >= 0", 0, closed="[")


def check_betas(name: str, value: Any) -> None:
    """Adam's two decays."""
    what = "two numbers in [0, 1)"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ConfigError(f"{name} must be {what}, found {found(value)}. Pass for example (0.9, 0.999).")
    for beta in value:
        check_number(name, beta, what, 0, 1, closed="[")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name} has no value {shown(value)}.{hint} Pass one of: {known}.")


def check_text(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be a text or None, found {found(value)}. Put it in quotes.")


def path_text(name: str, value: object) -> str | None:
    """The text of a path or of a name that may be one; None stays None."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_text(name, text)
    return text  # type: ignore[return-value]


def names(name: str, value: object) -> list[str]:
    """A list of non-empty names, in the given order; a bare text is refused: it would be read letter by letter."""
    if isinstance(value, str):
        raise ConfigError(f"{name} must be a list of names, found {found(value)}. Pass {name}=[{value!r}].")
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name} must be a list of names, found {found(value)}. Pass for example {name}=['q_proj'].")
    for item in value:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name} must hold names only, found {found(item)}. Remove it or name the module.")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def indices(name: str, value: object) -> list[int]:
    """A list of different integers >= 0, in the given order."""
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise ConfigError(f"{name} must be a list of integers, found {found(value)}. Pass for example [0, 1].")
    listed: list[int] = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    for item in listed:
        if not is_int(item) or not 0 <= item < 2**63:
            raise ConfigError(f"{name} must hold integers >= 0 only, found {found(item)}. Remove or correct it.")
    again = min(repeated(listed), default=None)
    if again is not None:
        raise ConfigError(f"{name} lists {shown(again)} more than once. Give every index once.")
    return listed


def check_keys(kind: str, given: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse keys that no field reads."""
    fields = list(known)
    for key in given:
        if key not in fields:
            raise ConfigError(
                f"{kind} has no setting {key!r} (found {key}={given[key]!r}).{did_you_mean(str(key), fields)} "
                f"It has: {', '.join(fields)}."
            )


def check_arguments(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that ``function`` does not have; values are not shown, for one may be a token."""
    listed = sorted(known)
    for name in given:
        if name not in listed:
            error = ConfigError(
                f"{function} has no argument {name!r}.{did_you_mean(name, listed)} Beside those of its signature it "
                f"has: {', '.join(listed)}."
            )
            refuse(error, "It was passed over.")


def name_table(name: str, value: object) -> dict[str, Any]:
    """A copy of a dict from names to values; None is the empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f'{name} must be a dict from module names to numbers, found {found(value)}. Pass {{"q_proj": 8}}.'
        )
    return dict(value)


def index_ranges(name: str, value: object) -> list[tuple[int, int]]:
    """A list of (start, end) pairs with 0 <= start < end."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} must be a list of (start, end) pairs, found {found(value)}. Pass [(0, 4), (2, 6)].")
    for pair in value:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(map(is_int, pair))
            or not 0 <= pair[0] < pair[1]
        ):
            raise ConfigError(f"{name} must hold (start, end) pairs with 0 <= start < end, found {found(pair)}.")
    return [(pair[0], pair[1]) for pair in value]


EnumT = TypeVar("EnumT", bound=Enum)


def member(kind: type[EnumT], name: str, value: object) -> EnumT | None:
    """The member of an enum of texts that ``value`` is or spells; None stays None."""
    if value is None:
        return None
    known = [str(item.value) for item in kind]
    text = str(value.value) if isinstance(value, Enum) else value
    check_choice(name, text, known)
    return kind(text)


def plain(value: object) -> Any:
    """The same value made of what json has: enums and paths as their text, sets as sorted lists, tuples as lists."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
