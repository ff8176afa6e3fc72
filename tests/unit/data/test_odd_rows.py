"""Rows that would be read by half, or as something else, in silence: each is read as it stands, or named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorafa.data.records import Record
from lorafa.data.rows import converter
from lorafa.errors import ConfigError, DataError, SourceError
from toys.records import as_cells, load, pairs, write_rows

ASKED = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def record_of(row: dict[str, Any], *named: str) -> Record:
    return converter("rows.jsonl", row, *(named or (None, None)))(row, "rows.jsonl, line 1")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "double", "input": 0, "output": "0"}, "column 'input' holds 0, expected text"),
        ({"instruction": "not", "input": False, "output": "true"}, "column 'input' holds False, expected text"),
        ({"prompt": "p", "completion": "c", "system": 0}, "column 'system' holds 0, expected text"),
        ({"prompt": "p", "completion": "c", "history": 0}, "'history' must be a list of pairs"),
        ({"prompt": "p", "completion": "c", "tools": 0}, "'tools' must be a list of objects, found 0"),
        ({"text": "t", "system": 0}, "a column 'system' beside 'text', which would not be read"),
    ],
)
def test_zero_and_false_are_no_empty_cells(row: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {text}"):
        record_of(row)


def test_an_input_that_is_the_answer_is_not_read_before_it() -> None:
    record = record_of({"instruction": "i", "input": "x"}, "instruction", "input")
    assert [message.content for message in record.messages] == ["i", "x"]


@pytest.mark.parametrize(
    ("first", "other", "text"),
    [
        (pairs(1)[0], {"messages": [ASKED, ANSWER]}, "messages, where the first one has prompt . completion"),
        ({"text": "t"}, {"question": "q", "answer": "a"}, "question . answer, where the first one has text"),
    ],
)
def test_a_row_of_an_earlier_form_than_the_first_one_is_named(
    tmp_path: Path, first: dict[str, Any], other: dict[str, Any], text: str
) -> None:
    file = write_rows(tmp_path / "d.jsonl", [first, {**first, **other}, first])
    with pytest.raises(DataError, match=rf"d\.jsonl, line 2: this row has {text} and is read by that\. Give all rows"):
        load(file)
    assert len(load(write_rows(file, [first, {**first, **dict.fromkeys(other)}])).train) == 2


def test_a_name_that_stands_twice_in_an_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "one", "question": "two", "answer": "a"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: cannot be read: 'question' stands twice in one object\. M"):
        load(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_a_row_of_any_number_of_names_is_refused_in_time(tmp_path: Path, name: str) -> None:
    names = [f"n{number}" for number in range(100_000)]
    row = "{" + "".join(f'"{one}":1,' for one in names) + '"n99999":2}' if name == "d.jsonl" else ",".join(names)
    (tmp_path / name).write_text(f"{row}\n{row if name == 'd.jsonl' else ','.join(['1'] * len(names))}\n")
    start = time.process_time()
    with pytest.raises(DataError) as error:
        load(tmp_path / name)
    assert time.process_time() - start < 4
    assert len(str(error.value)) <= 4000


def test_two_columns_of_one_name_in_a_parquet_file_are_named(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in ("one", "two", "a")]
    table = pyarrow.table(columns, names=["question", "question", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: two columns are called 'question'\. Rename one of them\."):
        load(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**ASKED, "\ud800": "x"}, ANSWER]},
        {"prompt": "p", "completion": "c", "tools": [{"\ud800": "x"}]},
    ],
)
def test_half_a_character_in_a_name_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"line 1: '\\ud800' at character 1 is half a character"):
        record_of(row)


def test_messages_in_the_cells_of_a_pair_are_messages(tmp_path: Path) -> None:
    """As a csv file holds the pairs of lists that a parquet file has."""
    cells = {"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWER])}
    (tmp_path / "d.csv").write_text(as_cells([cells]))
    (record,) = load(tmp_path / "d.csv").train
    assert [(message.role, message.content) for message in record.messages] == [("user", "q"), ("assistant", "a")]
    (plain,) = load(write_rows(tmp_path / "e.jsonl", [{"prompt": "[1]", "completion": "[2]"}])).train
    assert [message.content for message in plain.messages] == ["[1]", "[2]"]


def test_an_answer_without_text_among_others_is_named_unless_it_is_only_read() -> None:
    empty = {"role": "assistant", "content": " \n"}
    with pytest.raises(DataError, match=r"line 1: message 2 is an answer without text, .* or the weight 0 "):
        record_of({"messages": [ASKED, empty, ASKED, ANSWER]})
    assert len(record_of({"messages": [ASKED, {**empty, "weight": 0}, ASKED, ANSWER]}).messages) == 4
    call = {**empty, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert len(record_of({"messages": [ASKED, call, ASKED, ANSWER]}).messages) == 4


def test_fields_that_only_other_rows_of_a_parquet_file_have_are_not_there(tmp_path: Path) -> None:
    """All calls have the arguments of all there: null is what a call was not given."""
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("f", "g")]
    rows = [{"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    records = load(write_rows(tmp_path / "d.parquet", rows)).train
    assert sorted(record.messages[1].extra["tool_calls"][0]["function"]["name"] for record in records) == ["f", "g"]
    for record in records:
        (call,) = record.messages[1].extra["tool_calls"]
        assert call["function"]["arguments"] == {call["function"]["name"]: 1}


@pytest.mark.parametrize("other", ["./a.jsonl", "../{name}/a.jsonl", "."])
def test_a_file_that_is_named_twice_in_other_words_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", pairs(3))
    with pytest.raises(ConfigError, match=r"data= names 'a\.jsonl', which '.*' (is|holds) as well\. Name it once"):
        load("a.jsonl", other.format(name=tmp_path.name))


def test_weights_that_leave_a_source_without_a_row_or_are_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"{name}.jsonl", pairs(3, at)) for at, name in ((0, "a"), (3, "b")))
    with pytest.raises(DataError, match=r"\[1000, 1\] asks for rows of .*b\.jsonl, and its share of the 3 rows to tra"):
        load(one, two, weights=[1000, 1])
    with pytest.raises(ConfigError, match=r"data\.weights goes up to 1e\+100, found 1e\+308\. Give shares such as"):
        load(one, two, weights=[1e308, 1e308], train_size=4)


@pytest.mark.parametrize("name", ["a" * 300 + ".jsonl", "a" * 300, "a" * 300 + "/", "~nobody-here/a.jsonl"])
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(name: str) -> None:
    with pytest.raises(SourceError, match=r"File name too long|No dataset|is no file of rows|No file"):
        load(name)


def test_line_ends_that_end_no_line_are_said_as_such(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"prompt,completion\rp,c\r")
    with pytest.raises(DataError, match=r"d\.csv, line 1: cannot be read as cells: .* Save it with line ends of \\n"):
        load(tmp_path / "d.csv")
