"""Items of like size are worked on together: a batch pads little, and the largest comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lorafa.processes import by_turns, world_size

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (done, total) after every batch."""


def by_length(
    work: Callable[[list[int]], Sequence[T]], sizes: Sequence[int], batch_size: int, progress: Progress | None = None
) -> list[T]:
    """What ``work`` finds for each item, in the order of the items. Several processes share the batches out, and all
    get all.

    Args:
        work: the numbers of a batch's items -> what it finds for each, in their order.
        sizes: tokens of each item.
        batch_size: items of a batch, at most.
    """
    order = sorted(range(len(sizes)), key=lambda number: sizes[number], reverse=True)
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    done = 0

    def counted(numbers: list[int]) -> Sequence[T]:
        nonlocal done
        found = work(numbers)
        done += len(numbers) * world_size()
        if progress is not None:
            progress(min(done, len(order)), len(order))
        return found

    found = [one for batch in by_turns(counted, batches) for one in batch]
    of_item = dict(zip(order, found, strict=True))
    return [of_item[number] for number in range(len(sizes))]
