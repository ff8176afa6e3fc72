"""Prompts of a file: lines, rows of each form, and what waits for no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.data.unanswered import prompts_of
from lorafa.errors import DataError, SourceError


def written(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "p.jsonl")


def test_each_line_of_a_text_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfWho?\r\nWhere? \n\n")
    found = prompts_of(str(tmp_path / "p.txt"))
    assert [one.plain() for one in found] == [{"prompt": "Who?"}, {"prompt": "Where? "}]
    assert found[1].place.endswith("p.txt, line 2")


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        ({"prompt": "Who?"}, {"prompt": "Who?"}),
        ({"question": "Who?", "answer": "Ann"}, {"prompt": "Who?"}),
        ({"instruction": "Translate.", "input": "a b"}, {"prompt": "Translate.\n\na b"}),
        ({"instruction": "Translate.", "input": "", "output": "x"}, {"prompt": "Translate."}),
        ({"messages": [{"role": "user", "content": "Who?"}]}, {"prompt": "Who?"}),
        (
            {"prompt": "Who?", "system": "Be kind."},
            {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                          {"role": "user", "content": "c"}], "tools": [{"name": "f"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                          {"role": "user", "content": "c"}], "tools": [{"name": "f"}]},
        ),
        ({"prompt": [{"role": "user", "content": "Who?"}]}, {"prompt": "Who?"}),
    ],
)  # fmt: skip
def test_rows_of_each_form_are_read(row: dict[str, Any], plain: dict[str, Any], tmp_path: Path) -> None:
    assert [one.plain() for one in prompts_of(written(tmp_path, row))] == [plain]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a"}, r"p\.jsonl, line 2: no column of messages, prompt, question, instruction; this row has text"),
        ({"prompt": " "}, r"line 2: column 'prompt' holds ' ', expected text"),
        ({"messages": [{"role": "user", "content": " "}]}, "line 2: the prompt is empty, so there"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "line 2: 'messages' ends with a turn of the role assistant"),
        ({"messages": []}, "line 2: 'messages' must be a list"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_named(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=text):
        prompts_of(written(tmp_path, {"prompt": "Who?"}, row))


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(DataError, match=r"p\.txt holds no prompts"):
        prompts_of(str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    with pytest.raises(DataError, match=r"p\.txt, line 2: the prompt is empty"):
        prompts_of(str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_bytes(b"\xff\n")
    with pytest.raises(SourceError, match="is no text in UTF-8"):
        prompts_of(str(tmp_path / "p.txt"))
    with pytest.raises(SourceError, match=r"none\.txt cannot be read"):
        prompts_of(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="holds no"):
        prompts_of(written(tmp_path))
