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

    def remove(self, name: str) -> None:
        """Take an entry out again.

        Raises:
            ConfigError: as :meth:`get`.
        """
        self._require(name)
        del self._table[name]

    @contextmanager
    def added(self, name: str, entry: T) -> Iterator[T]:
        """An object of your own for the length of a with-block."""
        self.add(name, entry)
        try:
            yield entry
        finally:
            self.remove(name)

    def place(self, name: str) -> str | None:
        """Where an entry is that was not imported yet, as "module:object"; None where the object itself is here.

        Raises:
            ConfigError: as :meth:`get`.
        """
        self._require(name)
        entry = self._table[name]
        return entry if isinstance(entry, str) else None

    def get(self, name: str) -> T:
        """Return the object called ``name``, importing its module the first time.

        Raises:
            ConfigError: no such name; the nearest one and all known ones are listed.
        """
        self._require(name)
        entry = self._table[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(T, getattr(import_module(module), attribute))
            self._table[name] = entry
        return entry

    def _require(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._table:
            raise ConfigError(
                f"Unknown {self.kind} {name!r}.{did_you_mean(str(name), self._table)} Known: {', '.join(self.names())}."
            )
