"""The cells of a row: what they hold is taken as it stands, or refused with the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorafa.errors import DataError, first_line, shorten
from lorafa.settings.checks import repeated

Row = Mapping[str, Any]

MEND = "Mend or delete the row."


def as_row(row: Row) -> Row:
    """A row of a table whose nested columns have the same fields in all rows: those that a row has not given are null
    there, which is taken out again."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def columns(row: Row) -> str:
    """The names of the row's columns, in words."""
    return shorten((f"{column!s:.40}" for column in row), 10) or "(none)"


def given(row: Row, column: str) -> Any:
    """What a column holds; None where it is not there, or empty: null, no text, a list or an object of nothing."""
    value = row.get(column)
    return None if isinstance(value, str | list | tuple | dict) and not value else value


def text_of(row: Row, place: str, column: str) -> str:
    """The text in a column, which may not be blank."""
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; this row has {columns(row)}. Give every row the same columns.")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else repr(value)[:40]
        raise DataError(f"{place}: column {column!r} holds {found}, expected text. {MEND}")
    return checked(value, place)


def label_of(row: Row, place: str, column: str) -> str:
    """The text in a column that may name a class by a whole number, as data sets do."""
    value = row.get(column)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_of(row, place, column)


def checked(text: str, place: str) -> str:
    """The text itself, unless it holds half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {text[error.start]!r} at character {error.start + 1} is half a character (a lone surrogate). "
            f"{MEND}"
        ) from error
    return text


def all_checked(value: Any, place: str) -> Any:
    """The value, all texts in it checked."""
    if isinstance(value, str):
        return checked(value, place)
    if isinstance(value, dict):
        return {all_checked(key, place): all_checked(inner, place) for key, inner in value.items()}
    return [all_checked(inner, place) for inner in value] if isinstance(value, list) else value


def listed(value: Any, place: str, column: str) -> Any:
    """The value of a column that holds a list; as JSON where it is text, as the cells of a csv file are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parsed(value, f"{place}, column {column!r}", MEND)
    return value


def parsed(text: str, place: str, advice: str) -> Any:
    """The value that JSON text has; ``advice`` says what to do where it is none."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 30, 0) : error.pos + 30]
        raise DataError(
            f"{place}: not valid JSON: {error.msg} at character {error.pos + 1}, near {near!r}. {advice}"
        ) from error
    except (ValueError, RecursionError) as error:  # a name twice, a number of thousands of digits, deep brackets
        raise DataError(f"{place}: cannot be read: {first_line(error)}. {advice}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Python would take the last of two values of one name, and drop the first in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{repeated(name for name, _ in pairs)[0]!r} stands twice in one object")
    return found
