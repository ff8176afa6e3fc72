"""Samples in bytes are the samples that were written, in memory and in a file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa.data.chat import Sample
from lorafa.data.packing import Packs
from lorafa.data.samples import InFile, InMemory, Samples, SampleWriter, Stored
from lorafa.errors import SourceError
from lorafa.train.sampling import LengthSampler, lengths_of

PLACES = [
    "d.jsonl, line 3",
    "d.jsonl, line 12",
    "a b, row 7",
    "",
    "no number",
    "line 007",
    "n 99999999999999999999",
    "3",
]
tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=6)
written = st.lists(st.tuples(tokens, st.booleans(), st.sampled_from(PLACES)), min_size=1, max_size=6)


def sample_of(parts: tuple[list[tuple[int, bool]], bool, str]) -> Sample:
    pairs, cut, place = parts
    return Sample([i for i, _ in pairs], [i if trained else -100 for i, trained in pairs], cut, place)


def stored(samples: list[Sample]) -> tuple[Stored, InMemory]:
    content = InMemory()
    writer = SampleWriter(content)
    assert [writer.add(sample) for sample in samples] == list(range(len(samples)))
    return Stored(content, np.array(writer.sizes), list(writer.places)), content


@given(written)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_what_is_read_is_what_was_written(parts: list[tuple[list[tuple[int, bool]], bool, str]]) -> None:
    samples = [sample_of(one) for one in parts]
    found = Samples(stored(samples)[0], np.arange(len(samples)))
    assert list(found) == samples
    assert [one.place for one in found] == [one.place for one in samples]
    assert [(ids.tolist(), trained.tolist()) for ids, trained in found.tokens()] == [
        (one.input_ids, [label != -100 for label in one.labels]) for one in samples
    ]
    assert lengths_of(found).tolist() == lengths_of(samples)


def three() -> list[Sample]:
    return [Sample([n, n + 1], [-100, n + 1], place=f"d, row {n}") for n in range(3)]


def test_an_order_may_leave_samples_out_and_repeat_them_and_is_cut_like_a_list() -> None:
    samples = three()
    found = Samples(stored(samples)[0], np.array([2, 0, 2]))
    assert [one.place for one in found] == ["d, row 2", "d, row 0", "d, row 2"]
    assert (len(found), found[-1], list(found[1:])) == (3, samples[2], [samples[0], samples[2]])
    assert list(found[:None]) == list(found)
    assert not Samples(stored(samples)[0], np.zeros(0, int))
    with pytest.raises(IndexError):
        found[3]


def test_what_is_packed_or_ordered_by_length_is_that_of_the_same_samples_in_a_list() -> None:
    samples = [Sample([1] * size, [1] * size, place=f"d, row {size}") for size in (300, 5, 90, 700, 12, 5)]
    found = Samples(stored(samples)[0], np.arange(6))
    packs, same = (Packs(rows, lengths_of(rows), 1000) for rows in (found, samples))
    assert list(packs) == list(same)
    assert packs[0].place == "d, row 700, d, row 300"
    orders = [list(LengthSampler(lengths_of(rows), 2, 0)) for rows in (found, samples)]
    assert orders[0] == orders[1]


def test_samples_of_a_file_can_be_sent_to_another_process(tmp_path: Path) -> None:
    samples = three()
    memory, content = stored(samples)
    size = int(memory.sizes.sum()) * 5 + 13 * len(samples)
    (tmp_path / "s").write_bytes(b"head" + content.read(0, size))
    found = Samples(Stored(InFile(tmp_path / "s"), memory.sizes, ["d, row"], first=4), np.arange(3))
    assert list(found) == samples
    assert list(pickle.loads(pickle.dumps(found))) == samples
    (tmp_path / "s").write_bytes(b"head")
    with pytest.raises(SourceError, match=r"has become shorter while it was in use\. Start again"):
        found[2]
