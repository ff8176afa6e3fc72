"""From plain mappings to typed, frozen dataclasses and back: nothing is guessed, nothing is left over."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorafa.checks import found
from lorafa.errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name, its type, its neutral value and what it means."""

    name: str
    annotation: Any
    default: Any
    doc: str


def build(config_class: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make a config from nested plain values.

    Args:
        values: field name -> value; fields left out keep the class's own value.
        path: dotted name of the config itself, for error texts.

    Raises:
        ConfigError: a key no field reads, or a value of another type than the field's.
    """
    hints = get_type_hints(config_class)
    defaults = {field.name: field.default for field in fields(config_class)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in hints:
            raise ConfigError(
                f"There is no setting {prefix + str(key)!r} (found {values[key]!r}).{did_you_mean(str(key), hints)} "
                f"{path or 'The config'} has: {', '.join(hints)}."
            )
    return config_class(
        **{key: _typed(value, hints[key], prefix + key, defaults[key]) for key, value in values.items()}
    )


def plain(config: Any) -> Any:
    """The reverse of :func:`build`: nested dicts, lists and simple values, ready for yaml or json."""
    if is_dataclass(config):
        return {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    return list(config) if isinstance(config, tuple) else config


def keys(config_class: type, path: str = "") -> Iterator[Key]:
    """All settings of a config class, nested ones included, in the order they are written."""
    hints, docs = get_type_hints(config_class), field_docs(config_class)
    for field in fields(config_class):
        name = f"{path}.{field.name}" if path else field.name
        if is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], name)
        else:
            yield Key(name, hints[field.name], _default(field), docs.get(field.name, ""))


def read(value: Any, key: Key) -> Any:
    """The value of one setting as its type wants it.

    Raises:
        ConfigError: it is of another type.
    """
    return _typed(value, key.annotation, key.name, key.default)


def field_docs(config_class: type) -> dict[str, str]:
    """Field name -> the text that stands under it in the source, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[statement.target.id] = " ".join(doc.split())
    return docs


def expected(annotation: Any) -> str:
    """A type in words: ``an integer or null``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is list:
        return f"a list [a, b] of {_PLURAL[args[0]]}"
    if origin is tuple:
        return f"a list of {len(args)} {_PLURAL[args[0]]}"
    if origin is dict:
        return f"a mapping {{name: value}} of {_PLURAL[args[1]]}"
    return _SINGULAR[annotation]


_SINGULAR = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
_PLURAL = {int: "integers", float: "numbers", str: "texts"}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _typed(value: Any, annotation: Any, name: str, default: Any) -> Any:
    if is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a group of settings, found {found(value)}. Set its keys: {name}.<key>=...")
        return build(annotation, value, name)  # type: ignore[arg-type]
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
    """The value as the type wants it: a list as a tuple, an integer as a float; TypeError for all else.

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
    elif annotation is float and type(value) is int:
        return float(value)
    elif type(value) is annotation and value != "":
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
    return {int: "8", float: "0.5", str: "name", bool: "true"}[annotation]
