"""The texts that rows of published data sets become, from a file and from the Hub, and what a class may be given by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafa.data import DATASETS, data_set_names
from lorafa.errors import DataError
from toys.published import PLACES, ROWS, SIMILAR, Hub, load, texts, write


def test_every_data_set_of_the_hub_is_tested_here() -> None:
    of_the_hub = {name for name in data_set_names() if DATASETS.get(name).hub is not None}
    assert of_the_hub == ROWS.keys() == PLACES.keys()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_local_copy_becomes_the_published_text(name: str, ending: str, tmp_path: Path) -> None:
    row, prompt, answer = ROWS[name]
    file = write(tmp_path / f"copy.{ending}", [row])
    found = load(name, file=file)
    assert [texts(record) for record in found.train] == [(prompt, answer)]
    assert found.source == file


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub_becomes_the_same_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, prompt, answer = ROWS[name]
    hub_id, subset, _ = PLACES[name]
    hub = Hub(monkeypatch, train=[row])
    found = load(name, revision="v1")
    assert [texts(record) for record in found.train] == [(prompt, answer)]
    streaming = {"streaming": True} if name in ("flan", "flan_v2") else {}
    assert hub.asked == [(hub_id, subset, "train", {"revision": "v1", **streaming})]
    assert DATASETS.get(name).hub == hub_id


def test_what_can_be_graded_has_its_number_as_the_answer(tmp_path: Path) -> None:
    for name in ("gsm8k", "meta_math", "meta_math_full"):
        assert load(name, file=write(tmp_path / "copy.jsonl", [ROWS[name][0]])).train[0].answer == "2"
    assert load("sst2", file=write(tmp_path / "copy.jsonl", [ROWS["sst2"][0]])).train[0].answer is None


def test_rows_without_code_and_answers_that_decline_are_not_taken(tmp_path: Path) -> None:
    rows = [ROWS["codefeedback"][0], {"query": "Who?", "answer": "Ann."}, {"query": "Go.", "answer": "So:\n```\nopen"}]
    found = load("codefeedback", file=write(tmp_path / "code.json", rows))
    assert [texts(record)[1][-8:] for record in found.train] == ["t(1)\n```", "\nopen```"]
    outputs = ["Hi", "I am Sorry.", "As an AI model I ...", "Gas and air"]
    rows = [{"instruction": f"Go {n}.", "output": output} for n, output in enumerate(outputs)]
    found = load("wizard_lm", file=write(tmp_path / "wizard.json", rows))
    assert [texts(record)[1] for record in found.train] == ["Hi", "Gas and air"]
    with pytest.raises(DataError, match=r"holds no row with code: none of its 1 rows has ``` in its column 'answer'"):
        load("codefeedback", file=write(tmp_path / "code.json", [{"query": "Who?", "answer": "Ann."}]))
    with pytest.raises(DataError, match=r"holds no row that answers: none of its 1 rows has an 'output' without 'sorr"):
        load("wizard_lm", file=write(tmp_path / "wizard.json", rows[1:2]))


def test_rows_with_a_blank_answer_are_left_out_and_said(tmp_path: Path) -> None:
    rows = [{"instruction": f"Go {n}.", "input": "", "output": output} for n, output in enumerate(["a", " ", None])]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.warns(UserWarning, match=r"2 rows of .*a\.jsonl have a blank answer and are left out: .*a\.jsonl, l"):
        found = load("alpaca", file=file)
    assert len(found.train) == 1
    with pytest.warns(UserWarning, match="blank"), pytest.raises(DataError, match="holds no rows that can be trained"):
        load("alpaca", file=write(tmp_path / "b.jsonl", rows[1:]))


def test_a_blank_text_beside_another_is_read_as_it_stands(tmp_path: Path) -> None:
    found = load("qqp", file=write(tmp_path / "q.jsonl", [{"question1": "Why?", "question2": "", "label": 0}]))
    assert texts(found.train[0])[0] == f"{SIMILAR}Why?\n\nresult: "


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [2, "2", "contradiction"])
def test_a_class_is_given_by_number_or_by_word(label: Any, tmp_path: Path) -> None:
    row = ROWS["mnli"][0] | {"label": label}
    assert texts(load("mnli", file=write(tmp_path / "m.jsonl", [row])).train[0])[1] == "contradiction"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"line 2: column 'label' holds -1\. It stands for a class that is not told, as in a test split\. Known"),
        (3, r"line 2: column 'label' holds 3\. Known are 0 \(entailment\), 1 \(neutral\), 2 \(contradiction\), by n"),
        ("Neutral?", r"line 2: column 'label' holds 'Neutral\?'\. Known are"),
        (True, "column 'label' holds True"),
        (1.0, r"column 'label' holds 1\.0"),
        (None, "column 'label' holds None"),
    ],
)
def test_a_class_that_is_none_is_refused_with_its_row_and_those_that_are_known(
    label: Any, message: str, tmp_path: Path
) -> None:
    rows = [ROWS["mnli"][0], ROWS["mnli"][0] | {"label": label}]
    with pytest.raises(DataError, match=message):
        load("mnli", file=write(tmp_path / "m.jsonl", rows))
