"""A registry is a table: public name -> "module:object". It imports nothing until asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Generic, TypeVar, cast

from lorafa.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and where their objects are; an entry of your own is added with :meth:`add`."""

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table: dict[str, str | T] = dict(table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def names(self) -> list[str]:
        return sorted(self._table)

    def add(self, name: str, entry: T) -> None:
        """Register an object of your own; a name can be taken only once."""
        if name in self._table:
            raise ConfigError(f"{self.kind} {name!r} is already registered. Choose another name.")
        self._table[name] = entry

    @contextmanager
    def added(self, name: str, entry: T) -> Iterator[None]:
        """Register an object for the length of a with-block."""
        self.add(name, entry)
        try:
            yield
        finally:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Take a name off the table.

        Raises:
            ConfigError: no such name.
        """
        self.get(name)
        del self._table[name]

    def get(self, name: str) -> T:
        """Return the object called ``name``, importing its module the first time.

        Raises:
            ConfigError: no such name; the nearest one and all known ones are listed.
        """
        if name not in self._table:
            raise ConfigError(
                f"Unknown {self.kind} {name!r}.{did_you_mean(str(name), self._table)} Known: {', '.join(self.names())}."
            )
        entry = self._table[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(T, getattr(import_module(module), attribute))
            self._table[name] = entry
        return entry
