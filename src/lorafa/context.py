"""What holds for one call of the model, where every adapted layer can read it.

It is found at the door (:class:`lorafa.PeftModel`'s ``forward`` and ``generate``) and stays until the next call,
because activation checkpointing runs layers again in the backward pass, on another thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorafa.errors import BackendError

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_Layers = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """What holds for one call of the model."""

    facts: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """Adapter -> what its variant's ``fact`` has found."""


EMPTY = ForwardContext()
"""The context of a call that no formula has to know anything of."""


class CurrentCall:
    """The call in force; the adapted layers of a model share one.

    A call with gradients stays until the next one, for recomputation in its backward pass. A call without gradients
    (a reference pass, a probe, ``generate``) holds for its own length and leaves the one before in place.
    """

    def __init__(self) -> None:
        self._context = EMPTY
        self._open = 0
        self._keeps = False
        self._waiting: weakref.ref[_Backward] | None = None
        self._layers: _Layers = dict  # while a call is open

    def fact(self, name: str) -> Any:
        """What the variant of adapter ``name`` has found for the call in force.

        Raises:
            BackendError: the model was not called through its PeftModel, so nobody has looked.
        """
        if name not in self._context.facts or not (self._open or _in_backward()):
            raise BackendError(
                f"Adapter {name!r} depends on the inputs of the whole model, and this call did not come through its "
                "PeftModel. Call the PeftModel (or its generate), not the model inside."
            )
        return self._context.facts[name]

    def gathering(self, name: str) -> Any:
        """Where the layers put what the variant of adapter ``name`` gathers of the call in force: its ``fact``.

        None where nothing is to be gathered: the call has no gradients, did not come through the PeftModel, or its
        layers run again in its backward pass, so that they would be counted twice.
        """
        gathers = self._open and self._keeps and not _in_backward()
        return self._context.facts.get(name) if gathers else None

    def last(self, name: str) -> Any:
        """What the variant of adapter ``name`` has found for the last call with gradients; None if it counted in none.

        While a call is open: for that one.
        """
        return self._context.facts.get(name)

    def place_of(self, layer: Any) -> str:
        """The name of a layer in the model that is called, in words for an error: "a layer" where it is not known."""
        return next((repr(path) for path, other in self._layers().items() if other is layer), "a layer")

    @contextmanager
    def holding(
        self, context: ForwardContext, *, keeps: bool, recomputes: Callable[[], bool], layers: _Layers = dict
    ) -> Iterator[Callable[[Any], Any]]:
        """Let ``context`` hold for one call, and give what the call's output is to be passed through.

        Args:
            keeps: whether it is a call with gradients, which a backward pass may follow.
            recomputes: whether layers run again in the backward pass; asked only where it matters.
            layers: the adapted layers of the model by their names; asked only for an error.

        Raises:
            BackendError: they do, an earlier call with another context still waits for its backward pass, and this one
                would take its context away.
        """
        before = self._context
        if keeps and context is not before and self._waits() and recomputes():
            raise BackendError(
                "Two calls with gradients before one backward pass, of a model that runs its layers again in it "
                "(gradient checkpointing), and the adapter depends on the inputs of each call. Call backward after "
                "each, put both into one batch, or turn gradient checkpointing off."
            )
        kept, self._keeps = self._keeps, keeps
        known, self._layers = self._layers, layers
        self._context, self._open = context, self._open + 1
        try:
            yield self._watched if keeps and context is not EMPTY else _as_it_is
        finally:
            self._open, self._keeps, self._layers = self._open - 1, kept, known
            if not keeps:
                self._context = before

    def step(self, facts: Mapping[str, Any]) -> None:
        """Let ``facts`` hold from now on to the end of the call that is open: it runs the model many times."""
        self._context = ForwardContext(facts)

    def _waits(self) -> bool:
        backward = None if self._waiting is None else self._waiting()
        return backward is not None and not backward.begun

    def _watched(self, output: Any) -> Any:
        """The output, of which the first gradient to arrive says that the backward pass has begun."""
        backward = _Backward()
        self._waiting = weakref.ref(backward)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(backward)  # type: ignore[no-untyped-call]
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentCall:
        return memo.setdefault(id(self), CurrentCall())  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[type[CurrentCall], tuple[()]]:
        return CurrentCall, ()


class _Backward:
    """A hook on gradients; it lives as long as the graph it is in."""

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, grad: Tensor) -> None:
        self.begun = True


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _as_it_is(output: Any) -> Any:
    return output


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model returns: a tensor, or containers of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
