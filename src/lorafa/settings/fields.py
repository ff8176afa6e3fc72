"""A field of a config: its default, the form its values are brought to, and what they must be, said in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import field, fields, is_dataclass
from typing import Any

from lorafa.errors import ConfigError
from lorafa.settings.checks import check_choice, check_int, check_number, found, is_int, names
from lorafa.settings.expressions import END, WHOLE, expressions

LARGEST_RANK = 2**24
Form = Callable[[str, Any], Any]
"""Given a field's name and a value, its one form: a copy where it could be changed from outside."""
Check = Callable[[str, Any], object]
"""Given a field's name and a value in its one form; raises ConfigError if it is not allowed."""


def setting(
    default: Any = None,
    *,
    form: Form | None = None,
    check: Check | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A field of a dataclass that :func:`take_forms` and :func:`check_fields` know.

    Args:
        form: brings a value to its one form; None leaves it.
        check: raises ConfigError for a value that is not allowed; None allows all.
        factory: makes the default, in the place of ``default``.
    """
    known = {"form": form, "check": check}
    return field(default=default, metadata=known) if factory is None else field(default_factory=factory, metadata=known)


def take_forms(config: Any) -> None:
    """Bring every field of a dataclass to its one form without touching the objects handed in."""
    for one in fields(config):
        form: Form | None = one.metadata.get("form")
        if form is not None:
            setattr(config, one.name, form(one.name, getattr(config, one.name)))


def check_forms(config: Any) -> None:
    """Raises ConfigError for the first field of a dataclass that cannot be brought to its form; changes nothing."""
    for one in fields(config):
        form: Form | None = one.metadata.get("form")
        if form is not None:
            form(one.name, getattr(config, one.name))


def check_fields(config: Any) -> None:
    """Raises ConfigError for the first field of a dataclass whose value is not allowed."""
    for one in fields(config):
        check: Check | None = one.metadata.get("check")
        if check is not None:
            check(one.name, getattr(config, one.name))


# ---- checks


def whole(at_least: int) -> Check:
    """An integer that is not below ``at_least``."""
    return lambda name, value: check_int(name, value, at_least=at_least)


def rank_of_adapter(name: str, value: object) -> None:
    """The rank of an adapter: no layer has as many features as the largest that is allowed."""
    check_int(name, value, at_least=1)
    if isinstance(value, int) and value > LARGEST_RANK:
        raise ConfigError(f"{name} must be at most {LARGEST_RANK}, found {value}. Pass for example {name}=8.")


def check_settings(name: str, value: object) -> None:
    """A dict, an object of a class of settings, or None."""
    if value is not None and not isinstance(value, dict) and not is_dataclass(value):
        raise ConfigError(f"{name} must be a dict or an object of the start's settings, found {found(value)}. Drop it.")


def number(what: str, low: float, high: float = float("inf"), *, closed: str = "") -> Check:
    """A finite number in an interval; arguments as :func:`lorafa.settings.checks.check_number`."""
    return lambda name, value: check_number(name, value, what, low, high, closed=closed)


def one_of(choices: Collection[str]) -> Check:
    """One of these texts."""
    return lambda name, value: check_choice(name, value, choices)


def optional(check: Check) -> Check:
    """None, or what ``check`` allows."""
    return lambda name, value: None if value is None else check(name, value)


def patterns_to(check: Check) -> Check:
    """A dict from regular expressions to values that ``check`` allows."""

    def check_table(name: str, table: dict[str, Any]) -> None:
        expressions(name, tuple(table), END)
        for key, value in table.items():
            check(f"{name}[{key!r}]", value)

    return check_table


def check_pattern(name: str, value: object) -> None:
    """Names, or a text that is a regular expression."""
    if isinstance(value, str):
        expressions(name, (value,), WHOLE)


def check_mapping(name: str, value: object) -> None:
    """A dict or None."""
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name} must be a dict or None, found {found(value)}. Drop it or pass a dict.")


def check_tokens(name: str, value: object) -> None:
    """A list of token ids, of one at least, or None."""
    ids = isinstance(value, list) and all(is_int(token) and 0 <= token < 2**63 for token in value)
    if value is not None and not (ids and value):
        raise ConfigError(
            f"{name} must be a list of token ids, one at least, found {found(value)}. Tokenize the text: "
            f"tokenizer(text, add_special_tokens=False).input_ids."
        )


# ---- forms


def name_set(name: str, value: Any) -> Any:
    """A set of names; a text, which is a regular expression, and None stay."""
    return value if value is None or isinstance(value, str) else set(names(name, value))


def name_list(name: str, value: Any) -> list[str] | None:
    """A list of names; None stays."""
    return None if value is None else names(name, value)

