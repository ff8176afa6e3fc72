"""How large the heap of a process grows over a course of allocations: the gaps between freed blocks count too.

glibc looks for the smallest gap that holds a request, joins gaps that touch, and takes from the top otherwise. PyTorch
asks for memory at multiples of 64 bytes (posix_memalign): up to glibc 2.37 such a request takes a gap only if that is
96 bytes larger, so that a freed block is of no use to the next one of its size, and the pieces that are cut off lie
between the gaps, in the cache of small blocks, and keep them apart. On a CPU that is a fourth to a third of what a
training step takes (docs/LOG.md, 2026-11-30, what a run takes).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from lorafa.costs.untouched import Block

_ALIGNMENT, _HEADER, _UNIT, _LEAST = 64, 8, 16, 32
"""What PyTorch asks for; what stands before each block; what sizes are multiples of; the smallest block."""
_CACHED, _CACHED_OF_A_SIZE = 1032, 7
"""The largest block that glibc keeps aside without joining it to its neighbours, and how many of each size."""
_OBJECT = 40
"""Bytes of the small objects that come and go with a tensor, as far as they are of the sizes that are cut off: one of
this size fits what was measured best (0.9 to 1.1 of the growth of the heap in four trainings)."""


class Heap:
    """The heap as glibc fills it, by the sizes of the blocks alone."""

    def __init__(self) -> None:
        self.top = 0
        self.peak = 0
        """The highest top there was, bytes."""
        self._gaps: list[tuple[int, int]] = []
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._kept: dict[int, list[int]] = {}

    def aligned(self, size: int) -> tuple[int, int]:
        """Place a tensor of so many bytes; where the block is, and its size."""
        wanted = _rounded(size)
        start, taken = self._taken(wanted + _ALIGNMENT + _LEAST)
        lead = -(start + 2 * _HEADER) % _ALIGNMENT
        lead += _ALIGNMENT if 0 < lead < _LEAST else 0
        rest = taken - lead - wanted
        if rest < _LEAST:
            wanted, rest = wanted + rest, 0
        if lead:
            self.free(start, lead)
        if rest:
            self.free(start + lead + wanted, rest)
        return start + lead, wanted

    def small(self, size: int) -> tuple[int, int]:
        """Place an object."""
        wanted = _rounded(size)
        if kept := self._kept.get(wanted):
            return kept.pop(), wanted
        return self._taken(wanted)

    def free(self, start: int, size: int) -> None:
        """Give a block back."""
        if size <= _CACHED and len(kept := self._kept.setdefault(size, [])) < _CACHED_OF_A_SIZE:
            kept.append(start)
            return
        if start in self._ends:
            before = self._ends[start]
            size += self._remove(before)
            start = before
        if start + size in self._begins:
            size += self._remove(start + size)
        if start + size == self.top:
            self.top = start
        else:
            self._add(start, size)

    def _taken(self, size: int) -> tuple[int, int]:
        place = bisect_left(self._gaps, (size, -1))
        if place == len(self._gaps):
            start, self.top = self.top, self.top + size
            self.peak = max(self.peak, self.top)
            return start, size
        found, start = self._gaps[place]
        self._remove(start)
        if found - size < _LEAST:
            return start, found
        self._add(start + size, found - size)
        return start, size

    def _add(self, start: int, size: int) -> None:
        insort(self._gaps, (size, start))
        self._begins[start] = size
        self._ends[start + size] = start

    def _remove(self, start: int) -> int:
        size = self._begins.pop(start)
        del self._ends[start + size]
        self._gaps.pop(bisect_left(self._gaps, (size, start)))
        return size


def _rounded(size: int) -> int:
    return max(_LEAST, -(-(size + _HEADER) // _UNIT) * _UNIT)


def heap_peak(blocks: Sequence[Block]) -> int:
    """Bytes that the heap of a process grows to with these blocks, gaps included."""
    heap, places = Heap(), {}
    # What is given back behind an operation is given back after its own blocks were made, and before the next one's.
    changes = [(block.born, 0, number) for number, block in enumerate(blocks)]
    changes += [(block.died, 1, number) for number, block in enumerate(blocks) if block.died is not None]
    for _, freed, number in sorted(changes):
        if not freed:
            beside = heap.small(_OBJECT)
            places[number] = heap.aligned(blocks[number].size), beside
            continue
        for start, size in places.pop(number):
            heap.free(start, size)
    return heap.peak
