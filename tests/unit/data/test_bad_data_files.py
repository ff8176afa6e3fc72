"""Files as they come from the wild: what each gets, and that the advice fits what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.data.sources import load_records
from lorafa.errors import ConfigError, DataError, SourceError

ROW = '{"prompt": "p", "completion": "c"}\n'
PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(6)]


def load(path: Path, eval_size: int = 0, **settings: Any) -> Any:
    return load_records(str(path), train_size=None, eval_size=eval_size, seed=0, **settings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "d.jsonl"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "text", ["\ufeff" + ROW * 2, "\n\n" + ROW + " \n" + ROW, (ROW * 2).replace("\n", "\r\n"), ROW + ROW.strip()]
)
def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_no_harm(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    assert [[turn.content for turn in record.messages] for record in load(file).train] == [["p", "c"]] * 2


def test_an_ending_in_capital_letters_is_the_same_ending(tmp_path: Path) -> None:
    assert len(load(write(tmp_path / "D.JSONL", PAIRS)).train) == 6
    (tmp_path / "D.JSON").write_text(json.dumps(PAIRS))
    assert len(load(tmp_path / "D.JSON").train) == 6


def test_a_file_with_the_other_ending_is_told_its_own(tmp_path: Path) -> None:
    for text in (json.dumps(PAIRS), json.dumps(PAIRS, indent=1)):
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"line 1: .*It starts like one list of all rows: name the file \.json"):
            load(tmp_path / "d.jsonl")
    (tmp_path / "d.json").write_text(ROW * 2)
    with pytest.raises(DataError, match=r"d\.json: not valid JSON: Extra data .* If it holds one object a line, name"):
        load(tmp_path / "d.json")


def test_a_broken_line_is_shown_where_it_breaks(file: Path) -> None:
    file.write_text(ROW + '{"prompt": "' + "p" * 200 + '", "completion": "c" "d"}\n')
    with pytest.raises(
        DataError, match=r"line 2: not valid JSON: Expecting ',' delimiter at character 234, near '.*\"c\""
    ):
        load(file)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"n": ' + "9" * 5000 + "}"])
def test_what_the_reader_of_json_cannot_hold_is_named_by_its_line(file: Path, line: str) -> None:
    file.write_text(ROW + line)
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: cannot be read: .* Mend or delete it"):
        load(file)


def test_half_a_character_is_named_by_its_line(file: Path) -> None:
    file.write_text(ROW + '{"prompt": "a\\ud800b", "completion": "c"}\n')
    with pytest.raises(DataError, match=r"line 2: '.ud800' at character 2 is half a character.*Mend or delete the row"):
        load(file)
    write(file, [{"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "c"}]}])
    with pytest.raises(DataError, match=r"line 1: '.udfff' at character 1 is half a character"):
        load(file)


def test_a_row_with_other_columns_than_the_first_is_named_with_its_own(file: Path) -> None:
    write(file, [*PAIRS, {"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"line 7: no column 'prompt'; this row has question, answer\. Give every row"):
        load(file)


def test_of_many_and_long_columns_only_some_are_listed(file: Path) -> None:
    write(file, [{f"column {i} " * 100: "x" for i in range(500)}])
    with pytest.raises(DataError, match=r"has the columns column 0 .* \.\.\. and 490 more; accepted are") as caught:
        load(file)
    assert len(str(caught.value)) < 1000


def test_what_is_there_but_no_file_of_rows_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(SourceError, match=r"No file '.*d\.jsonl': it is a folder\. Check data="):
        load(tmp_path / "d.jsonl")
    with pytest.raises(SourceError, match=r"The folder '.*' holds no file of rows, but d\.jsonl/\. Files are"):
        load(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"No file '.*link\.jsonl': it is a link to nothing\."):
        load(tmp_path / "link.jsonl")
    for name in ("d.txt", "d.parquet.gz"):
        (tmp_path / name).write_text("prompt,completion\n")
        with pytest.raises(SourceError, match=r"'.*': a file of another kind\. Give alpaca, .*, word_problems, a file"):
            load(tmp_path / name)


def test_a_file_that_may_not_be_read_is_a_source_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    write(file, PAIRS)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"d\.jsonl cannot be read: Permission denied\. Check its permissions"):
        load(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subset": "main"}, r"d\.jsonl has no setting 'subset' \(found subset='main'\)\. It has: prompt_column, comp"),
        ({"split": "test"}, r"d\.jsonl has no setting 'split' \(found split='test'\)"),
        ({"revision": "v1"}, r"d\.jsonl has no setting 'revision'"),
        ({"templates": 3}, r"d\.jsonl has no setting 'templates'"),
        ({"cache_dir": "x"}, r"d\.jsonl has no setting 'cache_dir'"),
        (
            {"prompt_column": "prompt", "completion_column": "prompt"},
            r"data\.prompt_column and data\.completion_column are both 'prompt'\. Give two columns",
        ),
    ],
)
def test_a_setting_that_a_file_has_no_use_for_is_refused(file: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(file, PAIRS), **settings)


def test_a_setting_that_generated_problems_have_no_use_for_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data=word_problems has no setting 'subset' .* It has: templates, cache_dir"
    ):
        load_records("word_problems", train_size=1, eval_size=0, seed=0, subset="main")
    with pytest.raises(ConfigError, match=r"data=word_problems has no setting 'prompt_column'"):
        load_records("word_problems", train_size=1, eval_size=0, seed=0, prompt_column="a", completion_column="b")


def test_rows_that_all_ask_the_same_are_not_answered_with_smaller_sizes_alone(file: Path) -> None:
    write(file, [{"prompt": "same", "completion": str(i)} for i in range(9)])
    with pytest.raises(DataError, match=r"9 rows \(7 of them repeat .* Remove the rows that ask the same again, or lo"):
        load(file, eval_size=2)


def test_rows_that_ask_nothing_are_told_apart_by_what_they_say(file: Path) -> None:
    write(file, [{"messages": [{"role": "assistant", "content": f"text {i % 5}\n#### {i % 5}"}]} for i in range(6)])
    records = load(file, eval_size=2)
    assert len(records.train) + records.repeated == 4
    assert not set(records.train) & set(records.heldout)
    assert {record.answer for record in records.train + records.heldout} == {None}  # what is not asked is not graded
