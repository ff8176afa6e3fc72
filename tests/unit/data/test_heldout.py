"""Which rows are held out, and which of the others are not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.conf.compose import compose
from lorafa.data.heldout import rows_of
from lorafa.data.records import Message, Record
from lorafa.data.sources import load_records
from lorafa.errors import ConfigError, DataError, SourceError

Rows = list[dict[str, Any]]


def pairs(count: int, start: int = 0) -> Rows:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + count)]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(name: str, eval_size: int | float | None = None, train_size: int | None = None, **more: Any) -> Any:
    return load_records(name, train_size=train_size, eval_size=eval_size, seed=0, **more)


@pytest.mark.parametrize(
    ("size", "count", "rows"),
    [
        (None, 50, 5),
        (None, 5000, 100),
        (None, 7, 1),
        (None, 1, 0),
        (0.1, 50, 5),
        (0.01, 20, 1),
        (0.5, 1, 0),
        (0, 50, 0),
    ],
)
def test_rows_are_held_out_by_number_by_share_or_at_most_a_tenth(
    size: int | float | None, count: int, rows: int
) -> None:
    assert rows_of(size, count) == rows


def test_a_small_file_can_be_trained_on_with_the_settings_as_they_are(tmp_path: Path) -> None:
    data = compose([f"data={write(tmp_path / 'rows.jsonl', pairs(50))}"]).data
    records = load(data.name, data.eval_size)
    assert (len(records.train), len(records.heldout)) == (45, 5)


def test_nothing_is_held_out_where_that_is_asked(tmp_path: Path) -> None:
    records = load(write(tmp_path / "rows.jsonl", pairs(9)), 0)
    assert (len(records.train), records.heldout) == (9, [])


def test_the_rows_of_a_file_are_held_out_and_none_of_them_is_trained_on(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", pairs(20))
    test = write(tmp_path / "test.jsonl", [{"question": "question 3", "answer": "another"}, *pairs(5, start=18)][:1])
    records = load(rows, eval_file=test)
    assert [record.messages for record in records.heldout] == [
        (Message("user", "question 3"), Message("assistant", "another"))
    ]
    assert (len(records.train), records.repeated) == (19, 1)
    assert len(load(rows, eval_file=test, train_size=19).train) == 19
    with pytest.raises(DataError, match=r"holds 20 rows \(1 of them repeat one of .*test\.jsonl\), asked for 20"):
        load(rows, eval_file=test, train_size=20)
    with pytest.raises(DataError, match=r"check that data\.eval_file is another file"):
        load(rows, eval_file=rows)


def test_a_file_to_hold_out_is_read_by_the_same_columns(tmp_path: Path) -> None:
    named = {"prompt_column": "q", "completion_column": "a"}
    rows = write(tmp_path / "rows.jsonl", [{"q": f"{i}", "a": "b"} for i in range(3)])
    assert len(load(rows, eval_file=write(tmp_path / "t.jsonl", [{"q": "x", "a": "y"}]), **named).heldout) == 1
    with pytest.raises(DataError, match=r"t\.jsonl has no column 'q'"):
        load(rows, eval_file=write(tmp_path / "t.jsonl", pairs(1)), **named)
    with pytest.raises(SourceError, match=r"data\.eval_file=a/b is no file of rows"):
        load(rows, eval_file="a/b", **named)


def test_held_out_rows_are_said_in_one_way(tmp_path: Path) -> None:
    data = compose(["data=gsm8k", "data.eval_file=~/test (1).jsonl"]).data
    assert (data.eval_size, data.eval_file) == (None, "~/test (1).jsonl")
    with pytest.raises(
        ConfigError, match=r"All records of data\.eval_file=t\.jsonl are held out, found data\.eval_size=9"
    ):
        compose(["data.eval_file=t.jsonl", "data.eval_size=9"])
    with pytest.raises(
        ConfigError, match=r"data\.eval_size is a number of rows or a share .* found 9\.0\. Write data.*=9"
    ):
        compose(["data.eval_size=9.0"])
    with pytest.raises(DataError, match=r"data\.eval_size=0\.1 is a share of the rows, and word_problems does not say"):
        load("word_problems", 0.1, 100)


def chat(*turns: str) -> Record:
    roles = ("user", "assistant")
    return Record(tuple(Message(roles[number % 2], turn) for number, turn in enumerate(turns)))


def grown(chats: int) -> Rows:
    """Conversations turn by turn, each row the one before and one turn more."""
    rows = []
    for number in range(chats):
        turns: Rows = []
        for turn in range(3):
            turns = [*turns, {"role": "user", "content": f"{number}.{turn}?"}]
            turns = [*turns, {"role": "assistant", "content": f"{number}.{turn}!"}]
            rows.append({"messages": turns})
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_what_a_held_out_row_asks_is_answered_in_no_training_row(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "rows.jsonl", grown(20))
    records = load_records(path, train_size=None, eval_size=12, seed=seed)
    learnt = {
        record.messages[: at + 1]
        for record in records.train
        for at, message in enumerate(record.messages)
        if message.role == "assistant"
    }
    assert [record for record in records.heldout if record.messages in learnt] == []
    assert learnt.isdisjoint(record.messages[:2] for record in records.heldout)  # nor is an earlier turn of it
    assert len(records.train) + records.repeated + 12 == 60
    assert records.repeated > 0


def test_conversations_that_begin_alike_are_trained_on() -> None:
    from lorafa.data.heldout import without_heldout

    heldout = [chat("hello", "hello, what is it?", "a?", "a!")]
    other = chat("hello", "hello, what is it?", "b?", "b!")
    longer = chat("hello", "hello, what is it?", "a?", "something", "more?", "no")
    assert without_heldout([other, longer, chat("hello", "hello, what is it?")], heldout) == [other]
