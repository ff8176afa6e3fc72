"""The eight commonsense tasks: the published form, the word that is an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.errors import ConfigError, DataError
from lorafa.evals.commonsense import COMMONSENSE, TASKS, CommonsenseSettings, answer_in, scored
from lorafa.evals.entry import Source, Subject
from toys.language_models import byte_tokenizer, tiny_llama

ROWS = [
    {"instruction": f"Is {n} even? Answer true or false.", "input": "", "output": "the correct answer is true",
     "answer": "true" if n % 2 == 0 else "false"}
    for n in range(4)
]  # fmt: skip


def read(folder: Path, rows: list[dict[str, Any]] = ROWS, **own: Any) -> list[Any]:
    (folder / "test.json").write_text(json.dumps(rows))
    return COMMONSENSE.read(Source(str(folder / "test.json")), CommonsenseSettings(**({"task": "boolq"} | own)))


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution3", None),
        ("social_i_qa", "answer3.", "answer3"),
        ("hellaswag", "ending4", "ending4"),
        ("hellaswag", "ending5", None),
        ("winogrande", "Option1 or option2", "option2"),
        ("ARC-Easy", "answer5", "answer5"),
        ("ARC-Challenge", "answer 1", None),
        ("openbookqa", "", None),
    ],
)
def test_the_first_word_that_is_an_answer_counts(task: str, text: str, answer: str | None) -> None:
    assert answer_in(text, task) == answer


def test_all_eight_are_settings() -> None:
    assert len(TASKS) == 8
    for task in TASKS:
        CommonsenseSettings(task=task)  # type: ignore[arg-type]


def test_outputs_without_an_answer_are_wrong_and_counted(tmp_path: Path) -> None:
    scores = scored(read(tmp_path), ["true", "the correct answer is true", "no idea", "false"], "boolq")
    assert scores.measured.values == [1.0, 0.0, 0.0, 1.0]
    assert (scores.numbers["correct"], scores.numbers["unparsed"], scores.numbers["eval_task"]) == (2, 1, "boolq")
    assert scores.words == "boolq: 2 of 4 right (50.0%), 1 without an answer"


def test_a_model_answers_greedily_or_drawn(tmp_path: Path) -> None:
    subject, items = Subject(tiny_llama().eval(), byte_tokenizer()), read(tmp_path, size=2)

    def outputs(**own: Any) -> list[str]:
        settings = CommonsenseSettings(task="boolq", max_new_tokens=6, **own)
        COMMONSENSE.check(subject, items, settings)
        return [one["output"] for one in COMMONSENSE.measure(subject, items, settings, 2, lambda *_: None).answers]

    assert outputs() == outputs()
    assert outputs(temperature=1.0, seed=1) == outputs(temperature=1.0, seed=1) != outputs(temperature=1.0, seed=2)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"question": "?", "answer": "true"}], "no column 'instruction'"),
        ([ROWS[0] | {"answer": "solution1"}], r"'solution1' is none of boolq \(true\|false\)\. Name its own"),
        ([], "holds no rows"),
    ],
)
def test_a_file_of_another_form_is_an_error(rows: list[dict[str, Any]], text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=text):
        read(tmp_path, rows)


def test_what_is_not_said_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is eight tasks\. Name one: eval\.task=<boolq\|piqa"):
        read(tmp_path, task=None)
    with pytest.raises(ConfigError, match=r"dataset/piqa/test\.json .*: data=test\.json"):
        COMMONSENSE.read(Source(None), CommonsenseSettings(task="piqa"))
    with pytest.raises(ConfigError, match=r"with eval\.temperature=0 none are"):
        CommonsenseSettings(top_p=0.5)
    with pytest.raises(ConfigError, match="asks nothing of a run's held-out rows"):
        COMMONSENSE.check(Subject(None, None), COMMONSENSE.asks([], None), CommonsenseSettings(task="boolq"))
