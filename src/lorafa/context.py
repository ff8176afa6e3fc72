"""What holds for one call of the model, where every adapted layer can read it.

It is found at the door (:class:`lorafa.PeftModel`'s ``forward`` and ``generate``) and stays until the next call,
because activation checkpointing runs layers again in the backward pass, on another thread. While a call is open it
holds in its own thread alone, so that threads may call one model at the same time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafa.errors import BackendError
from lorafa.numerics.casts import Casts
from lorafa.numerics.dropping import Source, chosen

if TYPE_CHECKING:
    from typing_extensions import Self

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_Layers = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring rows of a batch that the same adapters count in."""

    rows: slice
    adapters: tuple[str, ...]
    index: Tensor
    """Where the rows lie in the batch as it was given, (rows,)."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Where the rows of each part of a batch are, all parts as long as the longest one."""

    gather: Tensor | None = None
    """(parts, most), the rows of the batch in each part, its first one again where it has fewer; None: parts of one
    size lie one after another."""
    back: Tensor | None = None
    """(rows,), the place of each row in ``gather``, one part after another."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A batch in parts, of which each can be computed by itself."""

    parts: tuple[Part, ...]
    order: Tensor | None = None
    """The row of the batch that comes to each place, (rows,); None where the rows stay as they lie."""
    back: Tensor | None = None
    """The place that each row of the batch has come to."""

    @cached_property
    def groups(self) -> Groups | None:
        """Each choice of adapters with all its rows; None where this would leave half of the places empty.

        Where the rows stay as they lie, parts of one choice are groups of their own.
        """
        sizes = [len(part.index) for part in self.parts]
        most, rows = max(sizes, default=0), sum(sizes)
        if most * len(sizes) >= 2 * rows:
            return None
        if self.order is None and min(sizes) == most:
            return Groups()
        indices = [part.index for part in self.parts]
        gather = torch.stack([torch.cat([index, index[:1].expand(most - len(index))]) for index in indices])
        back = torch.empty_like(torch.cat(indices))
        for group, index in enumerate(indices):
            back[index] = torch.arange(len(index), device=index.device) + group * most
        return Groups(gather, back)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which adapters count in each row of one call."""

    choices: tuple[tuple[str, ...], ...]
    """The adapters of each row; none for the base alone."""
    tokens: int = 1
    """Places a row has in the pass that runs."""
    copies: int = 1
    """How often ``generate`` has put each row beside itself, for beams or several answers."""
    steps: bool = False
    """Whether the pass is one of many over the same rows, as in ``generate``."""
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What layers keep for the passes that follow."""
    _layouts: dict[Any, Layout] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that count in some row."""
        return tuple(dict.fromkeys(name for choice in self.choices for name in choice))

    def in_pass(self, rows: int, tokens: int) -> Self:
        """The same for a pass over so many rows, copies among them, and tokens."""
        return replace(self, tokens=tokens, copies=max(rows // max(len(self.choices), 1), 1), steps=True)

    def fits(self, leading: int) -> bool:
        """Whether a tensor with so many entries along its first dimension may have all rows there, or all tokens."""
        count = len(self.choices)
        return leading in {count * k for k in (1, self.copies, self.tokens, self.copies * self.tokens)}

    def layout(self, leading: int, device: torch.device, *, sort: bool) -> Layout:
        """The parts of a tensor with so many entries along its first dimension, which :meth:`fits`.

        Args:
            sort: bring the rows of equal adapters together, so that there is one part for each choice; otherwise a row
                stays where it is.
        """
        key = leading, device, sort
        if key not in self._layouts:
            self._layouts[key] = self._laid_out(leading // max(len(self.choices), 1), device, sort)
        return self._layouts[key]

    def _laid_out(self, repeats: int, device: torch.device, sort: bool) -> Layout:
        choices = self.choices
        runs = sum(i == 0 or choices[i] != choices[i - 1] for i in range(len(choices)))
        lies: Sequence[int] = range(len(choices))
        sort = sort and runs > len(set(choices))
        if sort:
            first = {choice: i for i, choice in reversed(list(enumerate(choices)))}
            lies = sorted(lies, key=lambda i: first[choices[i]])
        index = (torch.tensor(lies, dtype=torch.long)[:, None] * repeats + torch.arange(repeats)).flatten().to(device)
        begins = [i for i in range(len(lies)) if i == 0 or choices[lies[i]] != choices[lies[i - 1]]]
        ends = [*begins[1:], len(lies)]
        rows = [slice(begin * repeats, end * repeats) for begin, end in zip(begins, ends, strict=True)]
        parts = tuple(Part(s, choices[lies[i]], index[s]) for i, s in zip(begins, rows, strict=True))
        return Layout(parts, index, index.argsort()) if sort else Layout(parts)


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """What holds for one call of the model."""

    facts: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """Adapter -> what its variant's ``fact`` has found."""
    rows: Rows | None = None
    """Which adapters count in which row; None: the active ones in all."""
    narrowed: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What ``facts`` say of parts of the rows, found when it is asked for."""


EMPTY = ForwardContext()
"""The context of a call that no formula has to know anything of."""


class _Here(threading.local):
    """What is open in one thread."""

    def __init__(self) -> None:
        self.context: ForwardContext | None = None  # None: no call is open
        self.keeps = False
        self.layers: _Layers = dict
        self.casts: Casts | None = None
        self.source: Source | None = None
        self.part: Part | None = None


class CurrentCall:
    """The call in force; the adapted layers of a model share one.

    A call with gradients stays until the next one, for recomputation in its backward pass. A call without gradients
    (a reference pass, a probe, ``generate``) holds for its own length and leaves the one before in place.
    """

    def __init__(self) -> None:
        self._kept = EMPTY  # of the last call with gradients
        self._casts = Casts()  # the same
        self._source: Source | None = None  # the same
        self._waiting: weakref.ref[_Backward] | None = None
        self._here = _Here()

    @property
    def part(self) -> Part | None:
        """The rows that are looked at, where adapters differ from row to row."""
        return self._here.part

    @property
    def opened(self) -> ForwardContext | None:
        """What holds for the call that is open in this thread; None where none is."""
        return self._here.context

    @property
    def rows(self) -> Rows | None:
        """Which adapters count in which row of the call in force; None: the active ones in all."""
        context = self._in_force()
        return None if context is None else context.rows

    def _in_force(self) -> ForwardContext | None:
        """What holds in this thread: a call that is open, or the one that runs again in its backward pass."""
        open_here = self._here.context
        if open_here is not None:
            return open_here
        return self._kept if self._kept is not EMPTY and _in_backward() else None

    @property
    def casts(self) -> Casts | None:
        """What the call in force, one with gradients, reads in the place of factors; None: the factors themselves."""
        here = self._here
        if here.context is not None:
            return here.casts
        return self._casts if _in_backward() else None

    @property
    def dropout_source(self) -> Source | None:
        """Where a block has said that the dropout of the call in force comes from; None: from the fastest."""
        here = self._here
        if here.context is not None:
            return here.source
        return self._source if _in_backward() else chosen()

    @contextmanager
    def looking_at(self, part: Part) -> Iterator[None]:
        """Let ``part`` be the rows that are looked at."""
        here = self._here
        before, here.part = here.part, part
        try:
            yield
        finally:
            here.part = before

    def fact(self, name: str, narrow: Callable[[Any, Tensor], Any] | None = None) -> Any:
        """What the variant of adapter ``name`` has found for the call in force.

        Args:
            narrow: gives what a fact says of the rows with these indices, (rows,); asked where only some are looked at.

        Raises:
            BackendError: the model was not called through its PeftModel, so nobody has looked.
        """
        context = self._in_force()
        if context is None or name not in context.facts:
            raise BackendError(
                f"Adapter {name!r} depends on the inputs of the whole model, and this call did not come through its "
                "PeftModel. Call the PeftModel (or its generate), not the model inside."
            )
        fact, part = context.facts[name], self.part
        if part is None or narrow is None:
            return fact
        known = context.narrowed
        if (name, part) not in known:
            known[name, part] = narrow(fact, part.index)
        return known[name, part]

    def gathering(self, name: str) -> Any:
        """Where the layers put what the variant of adapter ``name`` gathers of the call in force: its ``fact``.

        None where nothing is to be gathered: the call has no gradients, did not come through the PeftModel, or its
        layers run again in its backward pass, so that they would be counted twice.
        """
        here = self._here
        gathers = here.context is not None and here.keeps and not _in_backward()
        return here.context.facts.get(name) if gathers and here.context is not None else None

    def last(self, name: str) -> Any:
        """What the variant of adapter ``name`` has found for the last call with gradients; None if it counted in none.

        While a call is open: for that one.
        """
        here = self._here.context
        return (self._kept if here is None else here).facts.get(name)

    def place_of(self, layer: Any) -> str:
        """The name of a layer in the model that is called, in words for an error: "a layer" where it is not known."""
        path = self.path_of(layer)
        return "a layer" if path is None else repr(path)

    def path_of(self, layer: Any) -> str | None:
        """The name of a layer in the model that is called; None where it is not known."""
        return next((path for path, other in self._here.layers().items() if other is layer), None)

    @contextmanager
    def holding(
        self,
        context: ForwardContext,
        *,
        keeps: bool,
        recomputes: Callable[[], bool],
        layers: _Layers = dict,
        casts: bool = False,
    ) -> Iterator[Callable[[Any], Any]]:
        """Let ``context`` hold for one call, and give what the call's output is to be passed through.

        Args:
            keeps: whether it is a call with gradients, which a backward pass may follow.
            recomputes: whether layers run again in the backward pass; asked only where it matters.
            layers: what carries adapters in the model, by its name; asked only where a name is needed.
            casts: whether the factors of all layers may be made for products together, where it ``keeps``.

        Raises:
            BackendError: they do, an earlier call with another context still waits for its backward pass, and this one
                would take its context away.
        """
        if keeps and context is not self._kept and self._waits() and recomputes():
            raise BackendError(
                "Two calls with gradients before one backward pass, of a model that runs its layers again in it "
                "(gradient checkpointing), and the adapter depends on the inputs of each call. Call backward after "
                "each, put both into one batch, or turn gradient checkpointing off."
            )
        here = self._here
        before = here.context, here.keeps, here.layers, here.casts, here.source
        here.context, here.keeps, here.layers, here.casts, here.source = context, keeps, layers, None, chosen()
        if keeps:
            if casts:  # a call that waits for its backward pass may run layers again in it by what this one makes
                here.casts = Casts(self._casts.expected if self._waits() else self._casts.asked)
            self._kept, self._casts, self._source = context, here.casts or Casts(), here.source
        try:
            yield self._watched if keeps else _as_it_is
        finally:
            here.context, here.keeps, here.layers, here.casts, here.source = before

    def step(self, context: ForwardContext) -> None:
        """Let ``context`` hold from now on to the end of the call that is open: it runs the model many times."""
        self._here.context = context

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

    __torch_unserializable__ = True  # so that torch.save leaves it out without a warning

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
