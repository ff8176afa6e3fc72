"""MetaMathQA as published scripts train on it: which rows, which text of them, which tokens are trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafa.conf.compose import compose
from lorafa.data.chat import IGNORE, encode_all, encode_prompt
from lorafa.data.entry import Wanted
from lorafa.data.records import Records
from lorafa.data.sets.meta_math import PUBLISHED
from lorafa.data.sets.published import InOrder, PublishedSettings
from lorafa.data.sources import load_records
from lorafa.data.templates import find_template
from lorafa.errors import DataError, SourceError
from toys.chats import chat_tokenizer


def row(number: int, kind: str = "GSM_Rephrased", **changes: str) -> dict[str, str]:
    response = f"It is {number}.\n#### {number}\nThe answer is: {number}"
    return {"query": f"What is {number}?", "response": response, "type": kind} | changes


def write(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "MetaMathQA-395K.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def load(file: str, eval_size: Any = None, train_size: int | None = None, seed: int = 0) -> Records:
    return load_records("meta_math", train_size=train_size, eval_size=eval_size, seed=seed, file=file)


def questions(rows: list[Any]) -> list[str]:
    return [record.messages[0].content for record in rows]


def test_rows_of_gsm8k_are_taken_in_order_and_the_text_after_the_solution_is_cut(tmp_path: Path) -> None:
    rows = [row(0), row(1, "MATH_AnsAug"), row(2, "GSM_SV"), row(3, "GSM_AnsAug")]
    found = load(write(tmp_path, rows), eval_size=1)
    assert questions(found.train) == ["Q: What is 0?\nA: ", "Q: What is 2?\nA: "]
    assert found.train[1].messages[1].content == "It is 2.\n#### 2"
    assert found.train[1].answer == "2"
    assert questions(found.heldout) == ["Q: What is 3?\nA: "]


def test_the_rows_after_the_trained_ones_are_held_out_whatever_the_seed(tmp_path: Path) -> None:
    file = write(tmp_path, [row(number) for number in range(40)])
    published = replace(PUBLISHED, heldout=InOrder(trained=20, heldout=2))
    for seed in (0, 1):
        found = published.load(Wanted("meta_math", None, None, seed), PublishedSettings(file=file))
        assert questions(found.train) == [f"Q: What is {number}?\nA: " for number in range(20)]
        assert questions(found.heldout) == [f"Q: What is {number}?\nA: " for number in (20, 21)]
    assert len(published.load(Wanted("meta_math", 3, None, 0), PublishedSettings(file=file)).train) == 3


def test_the_published_numbers_of_rows_are_a_hundred_thousand_and_ten_thousand() -> None:
    assert PUBLISHED.heldout == InOrder(trained=100_000, heldout=10_000)


@pytest.mark.parametrize(("size", "held"), [(None, 2), (0, 0), (5, 5), (0.5, 11)])
def test_of_fewer_rows_the_last_ones_are_held_out(tmp_path: Path, size: Any, held: int) -> None:
    found = load(write(tmp_path, [row(number) for number in range(22)]), eval_size=size)
    assert (len(found.train), len(found.heldout)) == (22 - held, held)


def test_a_question_that_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    found = load(write(tmp_path, [row(1), row(2), row(2)]), eval_size=1)
    assert questions(found.train) == ["Q: What is 1?\nA: "]
    assert found.repeated == 1


def test_the_text_and_the_trained_tokens_are_the_published_ones(tmp_path: Path) -> None:
    """x + " " + y + end, of which the tokens of x alone are not trained; what is asked is x, id by id.

    The two blanks where x ends are tokenized apart: published code lets them be one token and counts past it.
    """
    record = load(write(tmp_path, [row(4)]), eval_size=0).train[0]
    tokenizer = chat_tokenizer("bytes", find_template("spaced"))
    x, y = (message.content for message in record.messages)
    sample = encode_all([record], tokenizer, 1000).samples[0]
    assert tokenizer.decode(sample.input_ids) == x + " " + y + tokenizer.eos_token
    asked = tokenizer(x).input_ids
    assert sample.input_ids == asked + tokenizer(" " + y + tokenizer.eos_token).input_ids
    assert sample.labels == [IGNORE] * len(asked) + sample.input_ids[len(asked) :]
    assert encode_prompt(record.question, tokenizer) == asked


def test_errors_name_what_is_missing_and_both_ways_to_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SourceError, match=r"meta-math/MetaMathQA from the Hub: no route\. Next step: check the conne"):
        load_records("meta_math", train_size=None, eval_size=None, seed=0)
    with pytest.raises(SourceError, match=r"data\.file=<MetaMathQA-395K\.json>"):
        load_records("meta_math", train_size=None, eval_size=None, seed=0)
    with pytest.raises(SourceError, match=r"data\.file=nowhere\.json is no file\. Give a copy of MetaMathQA-395K\.js"):
        load("nowhere.json")
    with pytest.raises(DataError, match=r"holds no row of GSM8K: none of its 1 rows has GSM in its column 'type'"):
        load(write(tmp_path, [row(0, "MATH")]))
    with pytest.raises(DataError, match="no text in the column 'type', by which rows are chosen"):
        load(write(tmp_path, [{"query": "q", "response": "r"}]))
    with pytest.raises(DataError, match="has no column 'query'"):
        load(write(tmp_path, [{"quary": "q", "response": "r", "type": "GSM"}]))
    with pytest.raises(DataError, match="nothing stands before 'The answer is:'"):
        load(write(tmp_path, [row(0, response="\nThe answer is: 1")]))
    with pytest.raises(DataError, match=r"holds 2 rows of GSM8K, of which the first 1 may be trained on \(0 of them"):
        load(write(tmp_path, [row(0), row(1)]), eval_size=1, train_size=2)
    with pytest.raises(DataError, match="asked for 3 to evaluate"):
        load(write(tmp_path, [row(0), row(1)]), eval_size=3)


def test_rows_come_from_the_hub_where_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def of_hub(*args: Any, **settings: Any) -> list[dict[str, str]]:
        asked.append((args, settings))
        return [row(0), row(1, "MATH_SV")]

    monkeypatch.setattr(datasets, "load_dataset", of_hub)
    found = load_records("meta_math", train_size=None, eval_size=0, seed=0, revision="v1")
    assert questions(found.train) == ["Q: What is 0?\nA: "]
    assert asked == [(("meta-math/MetaMathQA", None), {"split": "train", "revision": "v1"})]


def test_the_runner_takes_the_name_and_the_file() -> None:
    data = compose(["data=meta_math", "data.file=~/a copy (1).json"]).data
    assert (data.name, data.own.file) == ("meta_math", "~/a copy (1).json")
