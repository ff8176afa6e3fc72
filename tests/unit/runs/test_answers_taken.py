"""A file of answers has one writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafa.data.unanswered import prompts_of
from lorafa.errors import ConfigError
from lorafa.evals.answering import Answer
from lorafa.runs.answers import AnswerFile
from lorafa.runs.made_by import MadeBy

pytestmark = pytest.mark.skipif(os.name == "nt", reason="files are not held there")


def test_the_second_writer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    prompts, made_by, out = prompts_of(str(tmp_path / "prompts.txt")), MadeBy("a", {}), tmp_path / "out.jsonl"
    first, second, late = (AnswerFile(str(out), prompts, made_by, resume=False) for _ in range(3))
    first.open(0)
    with pytest.raises(ConfigError, match=r"out\.jsonl is taken: another process writes it.* give --resume"):
        second.open(0)
    first.add([Answer("1", False)])
    written = out.read_bytes()
    first.close()
    with pytest.raises(ConfigError, match="is taken"):
        late.open(0)  # it has looked before there was anything
    assert out.read_bytes() == written
    resumed = AnswerFile(str(out), prompts, made_by, resume=True)
    resumed.open(resumed.done(1))
    resumed.add([Answer("2", False), Answer("3", True)])
    resumed.close()
    assert len(out.read_text().splitlines()) == 3
