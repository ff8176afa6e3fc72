"""From plain mappings to typed, frozen dataclasses and back: nothing is guessed, nothing is left over."""

from __future__ import annotations

import ast
import inspect
import os
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorafa.errors import ConfigError, did_you_mean
from lorafa.settings.checks import found

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, its type, its neutral value and what it means."""

    name: str
    annotation: Any
    default: Any
    doc: str


@cache
def hints_of(config_class: Any) -> Mapping[str, Any]:
    """Field name -> its type; evaluating them takes longer than all else that is done with the settings of a run."""
    return get_type_hints(config_class)


def build(config_class: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make a config from nested plain values.

    Args:
        values: field name -> value; fields left out keep the class's own value.
        path: dotted name of the config itself, for error texts.

    Raises:
        ConfigError: a key no field reads, or a value of another type or range than the field's.
    """
    sorted_out = getattr(config_class, "sorted_out", None)  # of an open group
    if sorted_out is not None:
        values = sorted_out(values)
    hints = hints_of(config_class)  # type: ignore[arg-type]  # typeshed: no class is known to be hashable
    defaults = {field.name: field.default for field in settable(config_class)}
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in defaults:
            raise ConfigError(
                f"There is no setting {prefix + str(key)!r} (found {values[key]!r}).{did_you_mean(str(key), defaults)} "
                f"{path or 'The config'} has: {', '.join(defaults)}."
            )
    typed = {key: typed_value(value, hints[key], prefix + key, defaults[key]) for key, value in values.items()}
    try:
        return config_class(**typed)
    except ConfigError as error:  # a class that others use too names its fields without the group they are in
        named = re.match(r"\w+", str(error))
        if path and named and named[0] in defaults:
            raise ConfigError(prefix + str(error)) from error
        raise


def plain(config: Any) -> Any:
    """The reverse of :func:`build`: nested dicts, lists and simple values, ready for yaml or json."""
    if is_dataclass(config):
        values = {field.name: plain(getattr(config, field.name)) for field in settable(type(config))}
        for holder in _holders(type(config)):
            values |= values.pop(holder) or {}
        return values
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    return [plain(item) for item in config] if isinstance(config, (list, tuple)) else config


def keys(config_class: type, path: str = "") -> Iterator[Key]:
    """All settings of a config class, nested ones included, in the order they are written; of an open group those that
    all its entries have."""
    hints, docs = hints_of(config_class), field_docs(config_class)
    hidden = _holders(config_class)
    for field in settable(config_class):
        name, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        nested = next((arg for arg in (hint, *get_args(hint)) if is_dataclass(arg)), None)
        if field.name in hidden:
            continue
        if nested is not hint:
            yield Key(name, hint, _default(field), docs.get(field.name, ""))
        if nested is not None:
            yield from keys(nested, name)  # type: ignore[arg-type]


def _holders(config_class: type[Any]) -> list[str]:
    """The fields of an open group (:class:`lorafa.settings.groups.OpenGroup`) that hold settings of its entries."""
    return list(getattr(config_class, "opens", {}).values())


def settable(config_class: type[Any]) -> list[Field[Any]]:
    """The fields that can be given."""
    return [field for field in fields(config_class) if field.init]


@cache
def field_docs(config_class: type) -> Mapping[str, str]:
    """Field name -> the text that stands under it in the source, on one line; those that are inherited included."""
    docs: dict[str, str] = {}
    for one in reversed(config_class.__mro__):
        if is_dataclass(one):
            definition = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
            assert isinstance(definition, ast.ClassDef)
            docs |= docs_of(definition)
    return docs


def docs_of(definition: ast.ClassDef) -> dict[str, str]:
    """The same of a class as it is written."""
    docs = {}
    for statement, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[statement.target.id] = " ".join(doc.split())
    return docs


def expected(annotation: Any) -> str:
    """A type in words: ``an integer or null``."""
    return _in_words(annotation, _SINGULAR)


_SINGULAR = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
_PLURAL = {int: "integers", float: "numbers", str: "texts", bool: "true or false"}


def _in_words(annotation: Any, words: Mapping[Any, str]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(arg, words) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is list:
        return f"{'a list' if words is _SINGULAR else 'lists'} [a, b] of {_in_words(args[0], _PLURAL)}"
    if origin is tuple:
        return f"{'a list' if words is _SINGULAR else 'lists'} of {len(args)} {_in_words(args[0], _PLURAL)}"
    if origin is dict:
        return f"a mapping {{name: value}} of {_in_words(args[1], _PLURAL)}"
    if is_dataclass(annotation):
        return "a group of settings {name: value}"
    return "values" if annotation is Any else words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def typed_value(value: Any, annotation: Any, name: str, default: Any) -> Any:
    nested = [arg for arg in (annotation, *get_args(annotation)) if is_dataclass(arg)]
    if nested and isinstance(value, Mapping):
        return build(nested[0], value, name)  # type: ignore[arg-type]
    if is_dataclass(annotation):
        raise ConfigError(f"{name} is a group of settings, found {found(value)}. Set its keys: {name}.<key>=...")
    try:
        return _converted(value, annotation)
    except TypeError:
        words = f"{name} must be {expected(annotation)}, found {found(value)}."
        if get_origin(annotation) is Literal and isinstance(value, str):
            raise ConfigError(words + did_you_mean(value, get_args(annotation))) from None
        plain_default = default if isinstance(default, (bool, int, float, str)) else None
        example = _example(annotation) if plain_default is None else str(plain_default).lower()
        raise ConfigError(f"{words} Write {name}={example} for example.") from None


def _converted(value: Any, annotation: Any) -> Any:
    """The value as the type wants it: a list as a tuple, an integer as a float, a path as a text; else TypeError.

    An empty text is no value: it is what a variable of the shell that was never set leaves.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return _converted(value, arg)
            except TypeError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif origin in (list, tuple):
        if isinstance(value, (list, tuple)) and (origin is list or len(value) == len(args)):
            return origin(_converted(item, args[0]) for item in value)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {_converted(key, args[0]): _converted(item, args[1]) for key, item in value.items()}
    elif annotation is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif annotation is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    elif annotation is Any or (type(value) is annotation and value != ""):
        return value
    raise TypeError


def _example(annotation: Any) -> str:
    """A value of the type, as it is written on the command line."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _example(args[0])
    if origin is Literal:
        return str(args[0])
    if origin in (list, tuple):
        return "[" + ",".join(_example(arg) for arg in (args if origin is tuple else args * 2)) + "]"
    if origin is dict:
        return "{q_proj:" + _example(args[1]) + "}"
    if is_dataclass(annotation):
        return "{}"
    return {int: "8", float: "0.5", str: "name", bool: "true"}.get(annotation, "1")
