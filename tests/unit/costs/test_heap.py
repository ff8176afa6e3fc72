"""A heap keeps glibc's rules: gaps that are too small by 96 bytes are passed over, gaps that touch become one."""

from __future__ import annotations

from itertools import pairwise

from lorafa.costs.heap import Heap, heap_peak
from lorafa.costs.untouched import Block

MIB = 2**20


def test_blocks_lie_one_behind_the_other_at_multiples_of_64() -> None:
    heap = Heap()
    places = [heap.aligned(1000) for _ in range(5)]
    assert all((start + 16) % 64 == 0 for start, _ in places)
    assert all(one + size <= other for (one, size), (other, _) in pairwise(places))
    assert all(size >= 1000 + 8 for _, size in places)
    assert heap.peak < 5 * (1000 + 112)


def test_a_freed_block_is_of_no_use_to_the_next_one_of_its_size_but_to_a_smaller_one() -> None:
    heap = Heap()
    first, _ = heap.aligned(MIB), heap.aligned(MIB)
    heap.free(*first)
    assert heap.aligned(MIB)[0] > first[0] + MIB
    assert first[0] <= heap.aligned(MIB - 200)[0] < first[0] + 100


def test_gaps_that_touch_are_joined_and_the_last_one_goes_back_to_the_top() -> None:
    heap = Heap()
    blocks = [heap.small(100_000) for _ in range(4)]
    heap.free(*blocks[0])
    heap.free(*blocks[1])
    assert heap.small(200_000) == (0, 200_032)  # the 16 bytes that are left are too few for a block
    heap.free(*blocks[3])
    assert heap.top == blocks[3][0]


def test_small_blocks_are_kept_aside_seven_of_a_size() -> None:
    heap = Heap()
    blocks = [heap.small(40) for _ in range(9)]
    for block in blocks:
        heap.free(*block)
    assert [heap.small(40)[0] for _ in range(7)] == [block[0] for block in reversed(blocks[:7])]


def test_a_heap_is_never_smaller_than_what_is_alive_in_it() -> None:
    blocks = [Block(MIB * (1 + number % 5), number, number + 3) for number in range(50)]
    alive = max(sum(block.size for block in blocks if block.born <= at <= (block.died or at)) for at in range(60))
    assert alive <= heap_peak(blocks) < 3 * alive


def test_what_is_given_back_behind_an_operation_is_there_for_the_next_one() -> None:
    assert heap_peak([Block(MIB, 1, 1), Block(MIB // 2, 2)]) < MIB + 1000
    assert heap_peak([Block(MIB, 1, 2), Block(MIB // 2, 2)]) > 1.5 * MIB
