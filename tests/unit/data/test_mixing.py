"""Several sources in one training: shares, order, what is repeated, what is held out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa.conf.compose import compose
from lorafa.data.mixing import mixed
from lorafa.data.shares import apportioned
from lorafa.errors import ConfigError, DataError
from toys.records import asked, load, pairs, write_rows

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
counts = st.lists(st.integers(1, 30), min_size=1, max_size=5)
shares = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 10.0]), min_size=5, max_size=5)


def numbered(sizes: list[int]) -> list[Any]:
    ends = np.cumsum([0, *sizes])
    return [np.arange(a, b, dtype=np.int32) for a, b in pairwise(ends)]


@given(sizes=counts)
@quick
def test_without_weights_every_row_is_there_once_and_sources_end_together(sizes: list[int]) -> None:
    order = mixed(numbered(sizes), None, None)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert [number for number in order if number < sizes[0]] == list(range(sizes[0]))  # each in its own order


@given(sizes=counts, weights=shares, most=st.integers(1, 200))
@quick
def test_with_weights_every_beginning_of_the_order_has_the_shares(
    sizes: list[int], weights: list[float], most: int
) -> None:
    rows, given_weights = numbered(sizes), weights[: len(sizes)]
    order = mixed(rows, given_weights, most)
    assert len(order) == most
    ends = np.cumsum(sizes)
    source = np.searchsorted(ends, order, side="right")
    for size in range(1, most + 1):
        taken = np.bincount(source[:size], minlength=len(sizes))
        wanted = size * np.array(given_weights) / sum(given_weights)
        assert np.abs(taken - wanted).max() < 2
    for own in rows:  # a source that has no row left begins again: no row is there two times more than another
        times = Counter(order[np.isin(order, own)].tolist())
        assert max(times.values(), default=0) - min((times.get(int(n), 0) for n in own), default=0) <= 1


@given(sizes=counts, weights=shares)
@quick
def test_with_weights_alone_no_row_is_there_twice_and_a_source_is_used_up(
    sizes: list[int], weights: list[float]
) -> None:
    rows = numbered(sizes)
    order = mixed(rows, weights[: len(sizes)], None)
    assert len(set(order.tolist())) == len(order)
    assert any(set(own.tolist()) <= set(order.tolist()) for own in rows)


@given(total=st.integers(0, 60), sizes=counts)
@quick
def test_rows_are_shared_out_by_numbers_to_the_nearest_row(total: int, sizes: list[int]) -> None:
    total = min(total, sum(sizes))
    found = apportioned(total, sizes)
    assert sum(found) == total
    assert all(abs(own - total * size / sum(sizes)) < 1 for own, size in zip(found, sizes, strict=True))
    assert all(own <= size for own, size in zip(found, sizes, strict=True))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_rows(tmp_path / "a.jsonl", pairs(60)), write_rows(tmp_path / "b.csv", pairs(30, start=1000))


def from_b(records: Any) -> int:
    return sum(int(text.split()[1]) >= 1000 for text in asked(records))


def test_all_rows_of_all_sources_are_trained_on_and_held_out_in_proportion(two: tuple[Path, Path]) -> None:
    found = load(*two, eval_size=9)
    assert (len(found.train), from_b(found.train)) == (81, 27)
    assert (len(found.heldout), from_b(found.heldout)) == (9, 3)
    assert set(asked(found.train)).isdisjoint(asked(found.heldout))
    assert found.source == f"{two[0]} (54 of 60 rows) + {two[1]} (27 of 30 rows)"
    assert from_b(found.train[:9]) == 3  # the beginning is mixed as all of it is
    assert from_b(load(*two, eval_size=0.1).heldout) == 3
    assert (len(load(*two, eval_size=None).heldout), from_b(load(*two, eval_size=None).heldout)) == (9, 3)


def test_the_held_out_rows_of_a_source_are_those_it_has_alone(two: tuple[Path, Path]) -> None:
    alone = [asked(load(one, eval_size=0.1, seed=4).heldout) for one in two]
    together = asked(load(*two, eval_size=0.1, seed=4, weights=[1, 5], train_size=40).heldout)
    assert sorted(together) == sorted([*alone[0], *alone[1]])


def test_weights_are_shares_of_the_training_rows(two: tuple[Path, Path]) -> None:
    found = load(*two, weights=[1, 1])
    assert (len(found.train), from_b(found.train)) == (60, 30)
    assert len(set(asked(found.train))) == 60
    more = load(*two, weights=[1, 1], train_size=100)
    assert (len(more.train), from_b(more.train)) == (100, 50)
    times = Counter(text for text in asked(more.train) if int(text.split()[1]) >= 1000)
    assert (min(times.values()), max(times.values()), len(times)) == (1, 2, 30)
    assert more.train[:60] == found.train
    assert more.source.endswith("(50 from 30 rows)")
    assert load(*two, weights=[1, 1], train_size=100) == more
    assert load(*two, weights=[1, 1], train_size=100, seed=1) != more


def test_what_is_held_out_of_one_source_is_not_trained_on_from_another(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", pairs(20))
    second = write_rows(
        tmp_path / "b.jsonl", [{"question": f"question {i}", "answer": "another"} for i in reversed(range(25))]
    )
    for seed in range(4):
        found = load(first, second, eval_size=8, seed=seed)
        assert set(asked(found.train)).isdisjoint(asked(found.heldout))
        assert len(found.train) + found.repeated + 8 == 45
        assert found.repeated > 0


def test_a_file_to_hold_out_is_held_out_of_all_sources(two: tuple[Path, Path], tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", [*pairs(2), *pairs(3, start=1000)])
    found = load(*two, eval_size=None, eval_file=str(test))
    assert (len(found.train), found.repeated, len(found.heldout)) == (85, 5, 5)


def test_too_few_rows_and_a_source_that_has_none_left_are_named(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl \+ .*b\.csv holds 90 rows \(0 .*, asked for 9 .* and 82 to tr"):
        load(*two, eval_size=9, train_size=82)
    same = write_rows(tmp_path / "same.jsonl", pairs(1))
    with pytest.raises(DataError, match=r"No row of .*same\.jsonl is left to train on, and data\.weights asks for"):
        load(two[0], same, eval_size=None, eval_file=str(same), weights=[1, 1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], r"data\.weights is a number above 0 for each of the 2 sources, found \[1\]\. Give data\.weights=\[1,1\]"),
        ([1, 0], r"a number above 0 for each"),
        ([1, float("nan")], r"a number above 0 for each"),
    ],
)
def test_weights_that_are_no_shares_are_refused(two: tuple[Path, Path], weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*two, weights=weights)


def test_what_cannot_be_mixed_is_refused(two: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights are shares of several sources\. Give data=\[a\.jsonl"):
        load(two[0], weights=[1])
    with pytest.raises(ConfigError, match=r"data= names '.*a\.jsonl' twice\. Name it once; data\.weights with"):
        load(two[0], two[0])
    with pytest.raises(ConfigError, match=r"word_problems cannot be mixed with others or read as it is: its records"):
        load(two[0], "word_problems")


def test_several_sources_are_named_as_a_list_on_the_command_line() -> None:
    data = compose(["data=[a.jsonl,~/'b, (1).jsonl']".replace("~/", ""), "data.weights=[3,1]"]).data
    assert (data.name, data.weights) == (["a.jsonl", "b, (1).jsonl"], [3.0, 1.0])
    assert compose(["data=[a.jsonl,owner/name]", "data.split=test"]).data.own.split == "test"
    assert compose(["data=a [1].jsonl"]).data.name == "a [1].jsonl"
    with pytest.raises(ConfigError, match=r"data=\[a,b \(1\]\] cannot be read as a list: .*into quotes"):
        compose(["data=[a,b (1]]"])
    with pytest.raises(ConfigError, match=r"data=\[\] names no records\. Give a file"):
        compose(["data=[]"])
    with pytest.raises(ConfigError, match=r"for each of the 2 sources"):
        compose(["data=[a.jsonl,b.jsonl]", "data.weights=[1]"])


def test_a_file_and_a_data_set_of_the_hub_are_mixed_each_with_what_it_reads(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(pairs(12, start=2000)))
    found = load(two[1], "owner/name", eval_size=0.25, split="test")
    assert (len(found.train), len(found.heldout)) == (31, 11)
    assert {record.place.partition(",")[0] for record in found.train} == {str(two[1]), "owner/name"}
    assert found.source.endswith("owner/name (9 of 12 rows)")
    with pytest.raises(ConfigError, match=r"data=\[\.\.\.\] has no setting 'templates'"):
        load(two[1], "owner/name", templates=3)
