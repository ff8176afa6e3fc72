"""The eight commonsense tasks: the published form, the word that is an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.evals.commonsense import COMMONSENSE, TASKS, CommonsenseSettings, answer_in, scored
from lorafa.evals.commonsense_rows import PUBLISHED
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


OF_HUB: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": (
        {"question": "is ice cold", "answer": False, "passage": "Ice is."},
        "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "Cool a drink.", "sol1": "Add ice.", "sol2": "Add salt.", "label": 0},
        "Please choose the correct solution to the question: Cool a drink.\n\nSolution1: Add ice.\n\n"
        "Solution2: Add salt.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        {"context": "Ann won.", "question": "How is Ann?", "answerA": "sad", "answerB": "glad", "answerC": "ill",
         "label": "2"},
        "Please choose the correct answer to the question: Ann won. How is Ann?\n\nAnswer1: sad Answer2: glad Answer3: "
        "ill\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "hellaswag": (
        {"activity_label": "Cooking", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "3"},
        "Please choose the correct ending to complete the given sentence: Cooking: A man\n\nEnding1: a Ending2: b "
        "Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "Ann gave Bo _ .", "option1": "ice", "option2": "salt", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann gave Bo _ .\n\n"
        "Option1: ice Option2: salt Answer format: option1/option2",
        "option1",
    ),
    "ARC-Easy": (
        {"question": "What is ice?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        "Please choose the correct answer to the question: What is ice?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer "
        "format: answer1/answer2/answer3",
        "answer3",
    ),
    "ARC-Challenge": (
        {"question": "What is ice?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        "Please choose the correct answer to the question: What is ice?\n\nAnswer1: a Answer2: b\n\nAnswer format: "
        "answer1/answer2",
        "answer1",
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        "Please choose the correct answer to the question: Ice is\n\nAnswer1: a Answer2: b\n\nAnswer format: "
        "answer1/answer2",
        "answer2",
    ),
}  # fmt: skip
"""Task -> a row as on the Hub, what is asked, what is right."""


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_the_hub_are_asked_in_the_published_words(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, asked, answer = OF_HUB[task]
    fetched = []

    def rows(name: str, settings: Any) -> list[Any]:
        fetched.append((name, settings.subset, settings.split))
        return [(f"{name}, row 1", row)]

    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", rows)
    (record,) = COMMONSENSE.read(Source(None), CommonsenseSettings(task=task))  # type: ignore[arg-type]
    assert record.question[-1].content == asked
    assert record.answer == answer == answer_in(f"the correct answer is {answer}", task)
    official = PUBLISHED[task].official
    assert fetched == [(official.hub_id, official.subset, official.split)]


@pytest.mark.parametrize(
    ("task", "change", "text"),
    [
        ("boolq", {"answer": 1}, "answer is 1, expected true or false"),
        ("piqa", {"label": -1}, "label is -1, expected a number"),
        ("piqa", {"label": 2}, "none of the 2 answers is the right one"),
        ("hellaswag", {"label": ""}, "label is '', expected a number"),
        ("hellaswag", {"endings": "a"}, "endings is 'a', expected a list"),
        ("ARC-Easy", {"answerKey": "E"}, "none of the 3 answers is the right one"),
        ("openbookqa", {"choices": ["a"]}, "expected texts and labels"),
        ("winogrande", {"sentence": None}, "sentence"),
    ],
)
def test_a_row_of_the_hub_that_is_broken_is_named(
    task: str, change: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("hub, row 7", OF_HUB[task][0] | change)]
    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", lambda *_: rows)
    with pytest.raises(DataError, match=f"hub, row 7.*{text}"):
        COMMONSENSE.read(Source(None), CommonsenseSettings(task=task))  # type: ignore[arg-type]


def test_without_the_hub_the_error_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise SourceError("it cannot be reached")

    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", unreachable)
    text = r"the questions of piqa, ybisk/piqa, from the Hub: .*dataset/piqa/test\.json of .*, data=test\.json"
    with pytest.raises(SourceError, match=text):
        COMMONSENSE.read(Source(None), CommonsenseSettings(task="piqa"))


def test_what_is_not_said_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is eight tasks\. Name one: eval\.task=<boolq\|piqa"):
        read(tmp_path, task=None)
    with pytest.raises(ConfigError, match=r"with eval\.temperature=0 none are"):
        CommonsenseSettings(top_p=0.5)
    with pytest.raises(ConfigError, match=r"eval\.seed=3 says how tokens are drawn, and with eval\.temperature=0"):
        CommonsenseSettings(seed=3)
    with pytest.raises(ConfigError, match="asks nothing of a run's held-out rows"):
        COMMONSENSE.check(Subject(None, None), COMMONSENSE.asks([], None), CommonsenseSettings(task="boolq"))
