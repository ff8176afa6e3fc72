"""MMLU: the official files, the prompt, the letter that is likeliest, examples that do not fit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.evals import mmlu
from lorafa.evals.entry import Source, Subject
from lorafa.evals.mmlu import LETTERS, MMLU, MmluSettings
from lorafa.evals.shares import wilson_interval
from toys.language_models import byte_tokenizer, tiny_llama

DEV = [(f"What is {n} + 1?", str(n + 1), str(n), "0", "9", "A") for n in range(3)]
TEST = {
    "abstract_algebra": [("Is it, so?", "yes", "no", "both", 'a "quote"', "B"), ("And\nso?", *"abcd", "D")],
    "virology": [("Where?", "here", "there", "up", "down", "A")] * 3,
}


def archive(folder: Path, rows: dict[str, Any] | None = None) -> str:
    """The official files, of two subjects."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for subject, asked in (rows or TEST).items():
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(DEV if split == "dev" else asked)
    return str(folder)


def read(place: str | None, **own: Any) -> list[mmlu.Question]:
    return MMLU.read(Source(place), MmluSettings(**({"shots": 2} | own)))


def measured(questions: list[mmlu.Question], model: Any = None, **own: Any) -> Any:
    subject = Subject(model or tiny_llama().double().eval(), byte_tokenizer())
    MMLU.check(subject, questions, MmluSettings(**own))
    return MMLU.measure(subject, questions, MmluSettings(**own), 2, lambda *_: None)


def test_the_prompt_is_the_published_one(tmp_path: Path) -> None:
    first = read(archive(tmp_path))[0]
    assert first.prompt(2) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 0 + 1?\nA. 1\nB. 0\nC. 0\nD. 9\nAnswer: A\n\n"
        "What is 1 + 1?\nA. 2\nB. 1\nC. 0\nD. 9\nAnswer: A\n\n"
        'Is it, so?\nA. yes\nB. no\nC. both\nD. a "quote"\nAnswer:'
    )
    assert first.right == 1


def test_the_first_so_many_of_each_subject_are_asked(tmp_path: Path) -> None:
    found = read(archive(tmp_path), size=2)
    assert [one.subject for one in found] == ["abstract_algebra"] * 2 + ["virology"] * 2
    assert len(read(str(tmp_path))) == 5


def test_the_likeliest_letter_is_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = read(archive(tmp_path), shots=1)
    rows = [[-9, -1, -3, -4], [-1, -2, -3, -4], [-1, -2, -3, -4], [-2, -1, -3, -4], [-5, -4, -3, -2]]
    monkeypatch.setattr(mmlu, "log_probs", lambda *_: rows)
    scores = measured(questions)
    assert [one["output"] for one in scores.answers] == ["B", "A", "A", "B", "D"]
    assert scores.measured.values == [1.0, 0.0, 1.0, 0.0, 0.0]
    numbers = scores.numbers
    assert (numbers["correct"], numbers["total"]) == (2, 5)
    assert numbers["subjects"] == {"abstract_algebra": 0.5, "virology": pytest.approx(1 / 3)}
    assert numbers["mean_of_subjects"] == pytest.approx((0.5 + 1 / 3) / 2)
    assert numbers["interval"] == wilson_interval(2, 5)


def test_a_model_s_answers_are_those_of_its_logits(tmp_path: Path) -> None:
    questions, model, tokenizer = read(archive(tmp_path), shots=1), tiny_llama().double().eval(), byte_tokenizer()
    scores = measured(questions, model)
    for one, question in zip(scores.answers, questions, strict=True):
        ids = torch.tensor([tokenizer(question.prompt(1) + " ").input_ids])
        last = model(input_ids=ids).logits[0, -1].detach()
        assert one["output"] == max(LETTERS, key=lambda letter: float(last[tokenizer(letter).input_ids[0]]))


def test_examples_are_left_out_where_they_do_not_fit_and_that_is_said(tmp_path: Path) -> None:
    questions = read(archive(tmp_path), shots=3)
    with pytest.warns(UserWarning, match="5 of 5 questions have fewer examples"):
        scores = measured(questions, tiny_llama_of(200))
    assert scores.numbers["shorter"] == 5
    with pytest.raises(DataError, match=r"abstract_algebra_test\.csv, row 1: the question has \d+ tokens without any"):
        measured(questions, tiny_llama_of(90))


def tiny_llama_of(context: int) -> Any:
    model = tiny_llama().double().eval()
    model.config.max_position_embeddings = context
    return model


def test_a_letter_of_several_tokens_counts_with_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmlu, "LETTERS", ("Ax", "By", "Cz", "Dw"))
    questions = [mmlu.Question("s", "Which?", ("1", "2", "3", "4"), 0, "here")]
    with pytest.warns(UserWarning, match="in several tokens for 1 of 1 questions: their log-probabilities are added"):
        assert measured(questions).numbers["total"] == 1


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"a": [("Which?", "1", "2", "3", "A")]}, r"a_test\.csv, row 1: 5 cells"),
        ({"a": [("Which?", "1", "2", "3", "4", "E")]}, r"row 1: 6 cells, the last of them \['E'\]"),
        ({"a": [('Which?\ud800'.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), *"12345", "A")]},
         "7 cells"),
    ],
)  # fmt: skip
def test_a_row_of_another_form_is_an_error(rows: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=text):
        read(archive(tmp_path, rows))


def test_what_is_not_there_is_an_error_that_names_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"holds no files \*_dev\.csv\. Give the folder of the official csv files"):
        read(str(tmp_path))
    with pytest.raises(DataError, match=r"has 3 examples, asked for eval\.shots=5"):
        read(archive(tmp_path), shots=5)

    def unreachable(*_: Any) -> Any:
        raise SourceError("it cannot be reached")

    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", unreachable)
    with pytest.raises(SourceError, match=r"cais/mmlu, from the Hub: it cannot be reached\..*data=<folder>"):
        read(None)
    with pytest.raises(ConfigError, match="asks nothing of a run's held-out rows"):
        MMLU.check(Subject(None, None), MMLU.asks([], None), MmluSettings())


def test_rows_of_the_hub_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"question": "Which?", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 2}
    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", lambda *_: [("cais/mmlu, row 1", row)])
    (found,) = read(None, shots=1)
    assert (found.right, found.answers, len(found.shots)) == (2, ("a", "b", "c", "d"), 1)
    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", lambda *_: [("cais/mmlu, row 1", row | {"answer": 4})])
    with pytest.raises(DataError, match="with the answer 4, expected four texts and 0, 1, 2 or 3"):
        read(None, shots=1)
