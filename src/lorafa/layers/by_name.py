"""PEFT's tables on a layer (``scaling``, ``r`` ...): live views of the numbers that its adapters own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Generic, TypeVar

from lorafa.adapter import AdaptedLayer, Adapter
from lorafa.errors import AdapterError

T = TypeVar("T")


class ByName(MutableMapping[str, T]):
    """Adapter name -> one of its numbers; writing an entry sets the adapter's own."""

    def __init__(self, adapters: Mapping[str, Adapter], table: Table[T]) -> None:
        self._adapters = adapters
        self._table = table

    def __getitem__(self, name: str) -> T:
        return self._table.get(self._adapters[name])

    def __setitem__(self, name: str, value: T) -> None:
        if name not in self._adapters:
            raise AdapterError(
                f"{self._table.name}: the layer has no adapter {name!r}, only {', '.join(self._adapters) or 'none'}. "
                "Add it with add_adapter first."
            )
        self._table.put(self._adapters[name], value)

    def __delitem__(self, name: str) -> None:
        raise AdapterError(
            f"{self._table.name} shows a number that adapter {name!r} owns, so it goes with the adapter: call "
            "delete_adapter."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __ior__(self, other: Mapping[str, T]) -> ByName[T]:  # type: ignore[misc]
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(dict(self))


class Table(Generic[T]):
    """Declares one of PEFT's tables on a class of layers.

    Args:
        get: reads the number of an adapter.
        put: writes it; None where it follows from how the adapter was made.
    """

    def __init__(self, get: Callable[[Adapter], T], put: Callable[[Adapter, T], None] | None = None) -> None:
        self.get = get
        self._put = put
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: AdaptedLayer | None, owner: type | None = None) -> Any:
        return self if layer is None else ByName(layer.adapters, self)

    def __set__(self, layer: AdaptedLayer, values: Mapping[str, T]) -> None:
        ByName(layer.adapters, self).update(values)

    def put(self, adapter: Adapter, value: T) -> None:
        """Write the number of an adapter.

        Raises:
            AdapterError: it follows from how the adapter was made, and would be another one.
        """
        if self._put is not None:
            self._put(adapter, value)
        elif value != self.get(adapter):
            raise AdapterError(
                f"{self.name}[{adapter.name!r}] is {self.get(adapter)!r} since the adapter was made, and cannot be "
                f"{value!r}. Make another adapter with a config that says so."
            )


def number(field: str) -> Table[Any]:
    """The table of a number that may be written."""

    def put(adapter: Adapter, value: Any) -> None:
        setattr(adapter, field, value)

    return Table(lambda adapter: getattr(adapter, field), put)
