"""What entries of a registry declare, read from their source: nothing is imported to list settings, nor torch with it.

An entry is made by a call, of a class or of a decorator over a function, with keywords: ``settings=`` names the class
of its own settings. Entries that are here already, or that are no part of this package, are asked themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorafa.registry import Registry
from lorafa.settings.typed import Key, docs_of, keys

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Declared:
    """What an entry says of itself."""

    keywords: dict[str, Any]
    """Arguments of its call that are plain values."""
    settings: list[Key]
    """Its own settings. What was read from source has no types."""


def declared(registry: Registry[Any], name: str) -> Declared:
    """What an entry of a registry declares.

    Raises:
        ConfigError: there is no such entry.
    """
    place = registry.place(name)
    module, _, attribute = (place or "").partition(":")
    if place is None or not _is_ours(module):
        entry = registry.get(name)
        kind = getattr(entry, "settings", None)
        return Declared(_attributes(entry), list(keys(kind)) if isinstance(kind, type) else [])
    call = _call(module, attribute)
    values = {} if call is None else {word.arg: word.value for word in call.keywords if word.arg is not None}
    kind = values.get("settings")
    plain = {key: value.value for key, value in values.items() if isinstance(value, ast.Constant)}
    return Declared(plain, list(_keys(module, kind.id)) if isinstance(kind, ast.Name) else [])


def _attributes(entry: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(entry).items() if isinstance(value, (str, int, float, bool))}


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


@cache
def _body(module: str) -> list[ast.stmt]:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body


def _call(module: str, attribute: str) -> ast.Call | None:
    """The call that makes an object: the value it is assigned, or its decorator."""
    for statement in _body(module):
        made: list[ast.expr] = []
        if isinstance(statement, ast.Assign) and attribute in [getattr(one, "id", None) for one in statement.targets]:
            made = [statement.value]
        elif isinstance(statement, ast.FunctionDef) and statement.name == attribute:
            made = statement.decorator_list
        for call in made:
            if isinstance(call, ast.Call):
                return call
    return None


@cache
def _keys(module: str, name: str) -> tuple[Key, ...]:
    """The fields of a dataclass and of what it inherits from; a field that is there again has its last value."""
    found: dict[str, Key] = {}
    for definition in _lineage(module, name):
        docs = docs_of(definition)
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                field = statement.target.id
                found[field] = Key(field, Any, _value(statement.value), docs.get(field, ""))
    return tuple(found.values())


def _lineage(module: str, name: str) -> Iterator[ast.ClassDef]:
    """A class and those it inherits from, the farthest first."""
    for statement in _body(module):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            for base in statement.bases:
                if isinstance(base, ast.Name):
                    yield from _lineage(module, base.id)
            yield statement
        elif isinstance(statement, ast.ImportFrom) and statement.module and _is_ours(statement.module):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    yield from _lineage(statement.module, alias.name)


def _value(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node) if node is not None else None
