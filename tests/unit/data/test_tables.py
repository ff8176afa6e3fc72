"""Files of every kind, and folders of them: the same rows in all, and what a broken one gets."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafa.data.files import format_of
from lorafa.errors import ConfigError, DataError, SourceError
from toys.records import ENDINGS, asked, load, pairs, write_rows

ODD = [
    {"prompt": 'He said "no", twice', "completion": "one,\ttwo\nthree"},
    {"prompt": "a\u2028b\u0085c", "completion": "Größe 🙂"},
    {"prompt": "x" * 200_000, "completion": "; 'y'"},
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_row_is_the_same_in_files_of_every_kind(tmp_path: Path, ending: str) -> None:
    rows = [*ODD, *pairs(8)]
    found = load(write_rows(tmp_path / f"d{ending}", rows))
    told = {record.messages[0].content: record.messages[1].content for record in found.train}
    assert told == {row["prompt"]: row["completion"] for row in rows}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_split_is_that_of_the_same_rows_in_another_kind_of_file(tmp_path: Path, ending: str) -> None:
    first = load(write_rows(tmp_path / "first.jsonl", pairs(40)), eval_size=7, seed=3)
    found = load(write_rows(tmp_path / f"d{ending}", pairs(40)), eval_size=7, seed=3)
    assert (asked(found.train), asked(found.heldout)) == (asked(first.train), asked(first.heldout))


@pytest.mark.parametrize("ending", ENDINGS)
def test_chosen_rows_are_read_alone_and_counted_without_being_read(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"d{ending}", pairs(10))
    kind = format_of(path)
    assert kind is not None
    assert kind(path).count() == 10
    chosen = np.isin(np.arange(10), [1, 8])
    assert [(number, row["prompt"]) for number, _, row in kind(path).rows(chosen)] == [
        (1, "question 1"), (8, "question 8"),
    ]  # fmt: skip
    assert list(kind(path).rows(np.zeros(10, bool))) == []


def test_rows_are_named_by_the_line_where_they_begin(tmp_path: Path) -> None:
    for name, text in (
        ("d.csv", 'prompt,completion\n"a\nb",c\n\nd,\n'),
        ("d.tsv", 'prompt\tcompletion\n"a\nb"\tc\n\nd\t\n'),
        ("d.jsonl", '{"prompt": "a", "completion": "c"}\n\n\n\n{"prompt": "d", "completion": ""}\n'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name}, line 5: column 'completion' holds '', expected text"):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"d\.parquet, row 5: column 'completion' holds nothing"):
        load(write_rows(tmp_path / "d.parquet", [*pairs(4), {"prompt": "d", "completion": None}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b,c\n", r"d\.csv, line 2: it has 3 cells, and the first line names 2 columns\. Put"),
        ("prompt,completion\na\n", r"d\.csv, line 2: it has 1 cells"),
        ('prompt,completion\na,"b\n', r"d\.csv, line 2: cannot be read as cells: unexpected end of data\. Close its"),
        ('prompt,completion\na,"b"c\n', r"d\.csv, line 2: cannot be read as cells: .* write those inside a text twice"),
        ("prompt,prompt\na,b\n", r"d\.csv: two columns are called 'prompt'\. Rename one"),
        ("prompt;completion\na;b\n", r"one column, 'prompt;completion'; the cells seem to stand between ';', where"),
        ("prompt\tcompletion\na\tb\n", r"stand between '\\t', where ',' is expected\. Save it as \.csv with commas"),
        ("query,reply\na,b\n", r"d\.csv has the columns query, reply; accepted are: messages; .*conversations; text\."),
        ("prompt,completion\n", r"d\.csv holds no rows\. Each row has one of these sets of columns"),
        ("", r"d\.csv holds no rows"),
    ],
)
def test_cells_that_are_not_what_the_first_line_says_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.csv")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.jsonl.gz", "d.csv.gz"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_text_that_is_not_utf8_is_refused_at_its_byte(tmp_path: Path, name: str, encoding: str) -> None:
    content = '{"prompt": "Größe"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text: invalid .* at byte \d+\. Convert it to UTF-8"):
        load(tmp_path / name)


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", pairs(3))
    (tmp_path / "d.jsonl.gz").write_text("no gzip")
    with pytest.raises(DataError, match=r"d\.jsonl\.gz is a damaged gzip file: .*Fetch or make it again"):
        load(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(os.urandom(99))[:-20])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz is a damaged gzip file"):
        load(tmp_path / "d.jsonl.gz")
    for content in (b"", b"no parquet", write_rows(tmp_path / "whole.parquet", pairs(9)).read_bytes()[:-9]):
        (tmp_path / "d.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"d\.parquet cannot be read as a parquet file: .*Fetch or make it again"):
            load(tmp_path / "d.parquet")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", pairs(3))
    kind = format_of(path)
    assert kind is not None
    table = kind(path)
    assert table.count() == 3
    write_rows(path, pairs(4))
    with pytest.raises(DataError, match=r"d\.jsonl was changed while it was read\. Start again"):
        table.count()


def test_the_files_of_a_folder_are_read_by_their_names_each_in_its_own_form(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.csv", [{"question": "second", "answer": "a"}])
    write_rows(tmp_path / "a.jsonl.gz", pairs(1))
    write_rows(tmp_path / "c.parquet", [{"text": "third"}])
    found = load(tmp_path)
    places = {record.messages[0].content: record.place for record in found.train}
    assert places == {
        "question 0": f"{tmp_path / 'a.jsonl.gz'}, line 1",
        "second": f"{tmp_path / 'b.csv'}, line 2",
        "third": f"{tmp_path / 'c.parquet'}, row 1",
    }
    one = load(write_rows(tmp_path.parent / "one.jsonl", [*pairs(1), {"prompt": "second", "completion": "a"}]))
    assert asked(load(tmp_path, seed=0).train)[0] in places
    assert found.source == str(tmp_path)
    assert len(one.train) == 2


def test_what_else_lies_in_a_folder_is_said_and_passed_over(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", pairs(2))
    for name in (".hidden.jsonl", "README.md", "a.jsonl.zip"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    with pytest.warns(
        UserWarning, match=r"1 files are read\. Passed over: \.hidden\.jsonl, README\.md, a\.jsonl\.zip, more/; hidd"
    ):
        assert len(load(tmp_path).train) == 2


def test_an_empty_file_of_a_folder_is_said_and_a_folder_of_nothing_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds no rows"):
        load(tmp_path)
    write_rows(tmp_path / "b.jsonl", pairs(2))
    with pytest.warns(UserWarning, match=r"1 of 2 files in .* hold no rows: a\.jsonl\."):
        assert len(load(tmp_path).train) == 2
    (tmp_path / "c.jsonl").write_text('{"prompt": 1')
    with (
        pytest.warns(UserWarning, match="hold no rows"),
        pytest.raises(DataError, match=r"c\.jsonl, line 1: not valid JSON"),
    ):
        load(tmp_path)


def test_a_folder_without_rows_or_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"The folder '.*' holds no file of rows, but nothing\. Files are read that"):
        load(tmp_path)
    with pytest.raises(SourceError, match=r"nowhere/ is no file of rows\. Give one that ends in"):
        load(f"{tmp_path}/nowhere/")


def test_a_relative_folder_is_read_though_it_could_be_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_rows(tmp_path / "owner" / "name" / "a.jsonl", pairs(2))
    monkeypatch.chdir(tmp_path)
    assert len(load("owner/name").train) == 2


@pytest.mark.parametrize("settings", [{"prompt_column": "query"}, {"prompt_column": "a", "completion_column": "a"}])
def test_columns_are_named_in_pairs_for_every_kind_of_file(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompt_column"):
        load(write_rows(tmp_path / "d.csv", pairs(1)), **settings)
