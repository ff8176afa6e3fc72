"""The processes that work on one thing together: who is who, and what the first tells the others.

They are a group of torch.distributed, which `lorafa.launch` makes, or somebody else. A process that is alone is the
first of one.

What several processes do together is to be called by all of them, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

from lorafa import errors
from lorafa.errors import LoraError, first_line

T = TypeVar("T")
R = TypeVar("R")

# ---- who is who


_ALONE = ContextVar("alone", default=False)


def distributed() -> bool:
    """Whether there is a group of torch.distributed."""
    if _ALONE.get():
        return False
    torch = sys.modules.get("torch")  # who has not loaded it has made no group
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Which of the processes this is, counted from 0."""
    return _dist().get_rank() if distributed() else 0


def world_size() -> int:
    """How many there are."""
    return _dist().get_world_size() if distributed() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """What runs in the block goes by this process's data alone, as if there were no others; these may do other things.
    """
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def _dist() -> Any:
    import torch

    return torch.distributed


# ---- what they tell each other


def barrier() -> None:
    """Wait until all are here."""
    gathered(None)


def gathered(thing: T) -> list[T]:
    """What each has, in their order. Tensors inside must be on the CPU."""
    if not distributed():
        return [thing]
    everyone: list[T | None] = [None] * world_size()
    _dist().all_gather_object(everyone, thing)
    return cast(list[T], everyone)


def share(things: Sequence[T]) -> list[T]:
    """The things that are this process's: they are dealt out by turns."""
    return list(things[rank() :: world_size()])


def by_turns(work: Callable[[T], R], things: Sequence[T]) -> list[R]:
    """``work`` of every thing, in their order, of which each process does its share. The results are on the CPU.

    All call ``work`` equally often, as a model that is spread over them needs it: one that has nothing left does the
    first thing again, and that result is left out.
    """
    rounds = range(0, len(things), world_size())
    own = [work(things[first + rank()] if first + rank() < len(things) else things[0]) for first in rounds]
    turns = zip(*gathered(own), strict=True)
    return [result for turn in turns for result in turn][: len(things)]


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all of them; where it raises there, all raise."""
    if not distributed():
        return make()
    told: list[Any] = [None, None]
    own: BaseException | None = None
    if is_main():
        try:
            told[0] = make()
        except BaseException as error:  # an interrupt too, or the others would wait
            own, told[1] = error, Word.of(error)
    _dist().broadcast_object_list(told, src=0)
    if own is not None:
        raise own
    if told[1] is not None:
        raise told[1].error()
    return cast(T, told[0])


@contextmanager
def on_main(block: AbstractContextManager[T]) -> Iterator[T]:
    """The first process enters a block and leaves it; the others get what it gives, or raise what it raises."""
    with ExitStack() as entered:
        yield from_main(lambda: entered.enter_context(block))


@contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block while the others wait; then they do, and find in a cache what it has put there.

    Where it fails in the first process, all raise its error.
    """
    if not distributed():
        yield
        return
    if not is_main():
        from_main(lambda: None)
        yield
        return
    try:
        yield
    except BaseException as error:
        failed = error

        def fail() -> NoReturn:
            raise failed

        from_main(fail)
    else:
        from_main(lambda: None)


# ---- errors of others


class FromOther:
    """Marks an error that has happened in another process, and is raised here because of that."""


def is_from_other(error: BaseException) -> bool:
    """Whether the error has happened in another process, which says it there."""
    return isinstance(error, FromOther)


@dataclass(frozen=True)
class Word:
    """What a process says of the error that it has ended with."""

    process: int
    kind: str
    """The class in `lorafa.errors` that is nearest to the error's."""
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Word:
        named = [kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        text = str(error) if named else f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, KeyboardInterrupt):
            text = "it was interrupted."
        return cls(rank(), named[0].__name__ if named else "TrainingError", text)

    def error(self) -> LoraError:
        """The error as another process raises it."""
        kind = getattr(errors, self.kind)
        marked = type(self.kind, (FromOther, kind), {"__module__": kind.__module__})
        return cast(LoraError, marked(f"Process {self.process} has stopped: {self.text}"))
