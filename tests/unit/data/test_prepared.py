"""Tokens once: a second start has the samples of the first, and of nothing else; whatever happens to the cache."""

from __future__ import annotations

import gc
import hashlib
import json
import threading
import warnings
from array import array
from pathlib import Path
from typing import Any

import pytest

from lorafa.data import prepared, token_cache
from lorafa.data.chat import Encoder, encode_all
from lorafa.data.prepared import SampleSet, prepare_samples
from lorafa.data.records import Message, Record, Records
from lorafa.data.selection import as_loaded
from lorafa.data.tables import Table
from lorafa.errors import DataError, SourceError
from lorafa.storage.leavings import own_file
from toys.language_models import byte_tokenizer
from toys.records import found, load, pairs, write_rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [*pairs(30), *pairs(3)])


def prepare(
    *names: Path, cache: bool | None = True, length: int = 200, tokenizer: Any = None, **more: Any
) -> SampleSet:
    data = found(*names, **({"eval_size": 5} | more))
    return prepare_samples(data, byte_tokenizer() if tokenizer is None else tokenizer, length, cache)


def all_of(samples: SampleSet) -> tuple[Any, ...]:
    encodings = [
        ([(one, one.place, one.truncated) for one in part.samples], part.dropped, part.truncated, part.ends)
        for part in (samples.train, samples.heldout)
    ]
    rest = (samples.source, samples.repeated, samples.sha256, samples.tokens, samples.trained, samples.highest)
    return *encodings, *rest, list(map(repr, samples.records)), sorted(samples.lengths.tolist())


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Once it is called, no row is read and none is tokenized any more."""

    def stop() -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("read again")

        monkeypatch.setattr(Encoder, "sample", refuse)
        monkeypatch.setattr(Table, "opened", refuse)

    return stop


@pytest.mark.parametrize(("length", "more"), [(200, {}), (33, {"train_size": 11}), (30, {"eval_size": 0})])
def test_samples_are_those_of_records_in_memory_with_the_cache_or_without(
    cache: Path, rows: Path, length: int, more: dict[str, Any]
) -> None:
    tokenizer = byte_tokenizer()
    records = load(rows, **({"eval_size": 5} | more))
    train = encode_all(records.train, tokenizer, length)
    heldout = encode_all(records.heldout, tokenizer, length).samples if records.heldout else []
    digest = hashlib.sha256()
    for sample in (*train.samples, *heldout):
        digest.update(array("q", [len(sample.input_ids), *sample.input_ids, *sample.labels]).tobytes())
    for kept in (False, True, True):
        samples = prepare(rows, cache=kept, length=length, **more)
        assert (list(samples.train.samples), list(samples.heldout.samples)) == (train.samples, list(heldout))
        assert (samples.train.dropped, samples.train.truncated) == (train.dropped, train.truncated)
        assert (samples.sha256, list(samples.records)) == (digest.hexdigest(), records.heldout)
        assert samples.highest == max(max(sample.input_ids) for sample in (*train.samples, *heldout))
        assert samples.trained == sum(sample.trained for sample in train.samples)
        assert samples.tokens == sum(len(sample.input_ids) for sample in train.samples)
    assert train.truncated or length == 200


def test_a_second_start_reads_and_tokenizes_nothing(cache: Path, rows: Path, nothing_is_read: Any) -> None:
    first = all_of(prepare(rows))
    nothing_is_read()
    assert all_of(prepare(rows)) == first
    assert len(list(cache.iterdir())) == 1
    assert f"{rows}, line " in first[0][0][0][1]


def test_few_records_are_not_kept_where_nothing_is_said(
    cache: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(rows, cache=None)
    assert not cache.exists()
    monkeypatch.setattr(prepared, "CACHED_FROM", 33)
    assert all_of(prepare(rows, cache=None)) == all_of(first)
    assert len(list(cache.iterdir())) == 1


def test_what_decides_the_tokens_decides_which_are_taken(cache: Path, rows: Path, tmp_path: Path) -> None:
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "model")
    more_words = byte_tokenizer()
    more_words.add_tokens(["question"])
    test = write_rows(tmp_path / "test.jsonl", pairs(2))
    second = write_rows(tmp_path / "second.csv", pairs(20, start=50))
    starts: list[tuple[tuple[Path, ...], dict[str, Any]]] = [
        ((rows,), {}),
        ((rows,), {"length": 30}),
        ((rows,), {"seed": 1}),
        ((rows,), {"eval_size": 4}),
        ((rows,), {"train_size": 9}),
        ((rows,), {"tokenizer": other}),
        ((rows,), {"tokenizer": more_words}),
        ((rows,), {"eval_size": None, "eval_file": str(test)}),
        ((rows, second), {}),
        ((rows, second), {"weights": (1.0, 1.0)}),
        ((rows,), {"settings": {"prompt_column": "completion", "completion_column": "prompt"}}),
    ]
    files = set()
    for count, (names, more) in enumerate(starts, 1):
        first = prepare(*names, **more)
        assert all_of(prepare(*names, **more)) == all_of(first)
        files = {path.name for path in cache.iterdir()}
        assert len(files) == count, more
    write_rows(rows, [*pairs(30), *pairs(3, start=7)])
    prepare(rows)
    assert len({path.name for path in cache.iterdir()} - files) == 1
    write_rows(test, pairs(2, start=4))
    prepare(rows, eval_size=None, eval_file=str(test))
    assert len({path.name for path in cache.iterdir()} - files) == 2


def test_a_file_that_was_only_touched_is_the_same_file(cache: Path, rows: Path) -> None:
    prepare(rows)
    rows.touch()
    prepare(rows)
    assert len(list(cache.iterdir())) == 1


def test_what_was_said_is_said_again(cache: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "d.jsonl", [*pairs(6), {"prompt": "<|im_end|>", "completion": "c"}])
    for _ in range(2):
        with pytest.warns(UserWarning, match="has no chat template") as said:
            samples = prepare(rows, tokenizer=byte_tokenizer(None), eval_size=0, length=13)
        texts = [str(one.message) for one in said]
        assert "has no chat template" in texts[0]
        assert "1 of 7 rows spell a special token in a text" in texts[1]
        assert f"The first: {rows}, line 7." in texts[1]
        assert (samples.train.dropped, samples.train.truncated) == (0, 6)


@pytest.mark.parametrize("harm", ["a byte", "the end", "all", "the middle"])
def test_a_damaged_file_is_noticed_and_made_anew(cache: Path, rows: Path, harm: str) -> None:
    first = all_of(prepare(rows))
    (file,) = cache.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes({
        "a byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "the end": content[:-1], "all": b"", "the middle": content[:middle] + content[middle + 5 :],
    }[harm])  # fmt: skip
    with pytest.warns(UserWarning, match=r"The tokens in .*\.tokens are damaged, and are made anew\."):
        assert all_of(prepare(rows)) == first
    assert file.read_bytes() == content


@pytest.mark.parametrize("at", [1, 12])
def test_a_full_disk_leaves_nothing_behind_and_the_tokens_in_memory(
    cache: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole, count = all_of(prepare(rows, cache=False)), 0
    write = token_cache._Hashed.write

    def fail(self: Any, content: bytes) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(28, "No space left on device")
        write(self, content)

    monkeypatch.setattr(token_cache._Hashed, "write", fail)
    monkeypatch.setattr(prepared, "CACHED_FROM", 1)
    with pytest.warns(
        UserWarning,
        match=r"could not be kept in the cache: .*No space left on device\..* They are kept in memory for th",
    ):
        assert all_of(prepare(rows, cache=None)) == whole
    assert list(cache.iterdir()) == []
    count = 0
    with pytest.raises(
        DataError, match=r"No space left.* LORAFA_CACHE names another folder for it\. With data\.cache=f"
    ):
        prepare(rows)
    assert list(cache.iterdir()) == []


def test_a_tokenizer_that_cannot_be_told_from_others_keeps_tokens_out_of_the_cache(cache: Path, rows: Path) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained = refuse
    with pytest.raises(DataError, match=r"the tokenizer \(\w+\) cannot be saved, so that nothing would .*: NotImpl"):
        prepare(rows, tokenizer=tokenizer)
    assert not cache.exists()


def test_a_cache_that_cannot_be_made_is_said(cache: Path, rows: Path) -> None:
    cache.parent.write_text("a file in the way")
    with pytest.raises(
        DataError, match=r"could not be kept in the cache: .*tokens .*LORAFA_CACHE names another folder"
    ):
        prepare(rows)


def test_what_a_start_left_that_was_killed_is_removed_and_what_another_writes_is_not(cache: Path, rows: Path) -> None:
    cache.mkdir(parents=True)
    old = cache / f".a.tokens.{'0' * 32}.tmp"
    old.write_text("half")
    with own_file(cache, "b.tokens") as new:
        prepare(rows)
        assert not old.exists()
        assert new.exists()


def test_a_bad_row_is_named_and_leaves_no_file(cache: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "d.jsonl", [*pairs(9), {"prompt": "p", "completion": "\ufdd0"}])
    with pytest.raises(DataError, match=r"d\.jsonl, line 10: A text holds one of U\+FDD0"):
        prepare(rows, eval_size=0)
    assert list(cache.iterdir()) == []


def test_what_goes_wrong_with_the_records_is_not_blamed_on_the_cache(
    cache: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = found(rows, eval_size=5)
    assert data.selection  # it was read once
    rows.unlink()
    monkeypatch.setattr(type(data), "digest", lambda _: "known")
    with pytest.raises(SourceError, match=r"No file '.*rows\.jsonl'"):
        prepare_samples(data, byte_tokenizer(), 200, True)
    assert list(cache.iterdir()) == []


def test_records_that_a_data_set_makes_itself_are_kept_by_what_they_are(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(answer: str) -> Any:
        records = [
            Record((Message("user", f"q{i}"), Message("assistant", answer)), place=f"made {i}") for i in range(9)
        ]
        given = found("word_problems", train_size=4)
        object.__setattr__(given, "__dict__", {**given.__dict__, "selection": as_loaded(Records(records, [], "made"))})
        return given

    first = prepare_samples(data("a"), byte_tokenizer(), 200, True)
    assert all_of(prepare_samples(data("a"), byte_tokenizer(), 200, True)) == all_of(first)
    assert len(list(cache.iterdir())) == 1
    prepare_samples(data("b"), byte_tokenizer(), 200, True)
    assert len(list(cache.iterdir())) == 2


def test_held_out_records_come_back_with_all_they_have(cache: Path, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, 2.5]}}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "4", "name": "f"},
        {"role": "assistant", "content": "#### 4"},
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    rows = write_rows(tmp_path / "d.jsonl", [row, {"messages": messages[::3]}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, first, second = (prepare(rows, cache=kept, eval_size=1, seed=1) for kept in (False, True, True))
    assert repr(plain.records[0]) == repr(first.records[0]) == repr(second.records[0])
    assert first.records[0].answer == "4"


def test_a_value_that_json_has_not_keeps_tokens_out_of_the_cache() -> None:
    import datetime

    record = Record(
        (Message("user", "q", {"when": datetime.date(2020, 1, 1)}), Message("assistant", "a")), place="d, row 2"
    )
    with pytest.raises(
        token_cache.CheckpointError, match=r"d, row 2 holds a value that JSON has not\. Write it as text"
    ):
        token_cache.records_as_json([record])


def test_starts_at_the_same_time_have_the_same_samples(cache: Path, rows: Path) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(all_of(prepare(rows)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [all_of(prepare(rows, cache=False))] * 4
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_no_more_records_are_in_memory_than_are_held_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    rows = write_rows(tmp_path / "rows.csv", pairs(400))
    gc.collect()
    others = sum(type(one) is Record for one in gc.get_objects())
    most, sample = 0, Encoder.sample

    def counting(self: Encoder, record: Record) -> Any:
        nonlocal most
        if record.place.endswith("1"):
            most = max(most, sum(type(one) is Record for one in gc.get_objects()))
        return sample(self, record)

    monkeypatch.setattr(Encoder, "sample", counting)
    assert len(prepare(rows, cache=kept).train.samples) == 395
    assert 5 <= most - others < 15


def test_the_facts_of_a_file_are_json_at_its_end(cache: Path, rows: Path) -> None:
    samples = prepare(rows)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    assert content.startswith(b"lorafa tokens 1\n")
    size = int.from_bytes(content[-40:-32], "little")
    facts = json.loads(content[-64 - size : -64])
    assert facts["sha256"] == samples.sha256
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]


def test_rows_of_the_hub_are_the_same_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = pairs(20)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    name = Path("owner/name")
    first = prepare(name)
    assert all_of(first) == all_of(prepare(name, cache=False)) == all_of(prepare(name))
    rows[3] = {"prompt": "another", "completion": "one"}
    assert prepare(name).sha256 != first.sha256
    assert len(list(cache.iterdir())) == 2
