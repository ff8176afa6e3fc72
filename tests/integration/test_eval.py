"""`lorafa eval`: what a run measured, again; files; several subjects on the same items; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification

from lorafa.cli.main import main
from lorafa.evals import EVALS
from toys.kinds import make_bert
from toys.workplace import make_workplace, read, settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with two finished runs on the same rows."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    for name, rate in (("a", "1e-2"), ("b", "1e-3")):
        words = [word for word in settings(folder, folder / name) if not word.startswith("optim.lr")]
        assert main(["train", *words, f"optim.lr={rate}", "train.checkpoint_every=0"]) == 0
    (folder / "text.txt").write_text("Ann has 2 apples and gets 3 more.\n" * 40, encoding="utf-8")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["eval", *map(str, words)])
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


def rows(capsys: pytest.CaptureFixture[str], *words: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_is_measured_as_it_was_after_its_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = read(place / "a" / "result.json")["after"]
    loss, accuracy = rows(capsys, place / "a")
    assert loss["task"] == "perplexity"
    assert loss["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert loss["perplexity"] == pytest.approx(math.exp(after["loss"]), rel=1e-4)
    assert {name: accuracy[name] for name in ("correct", "total", "cut")} == {
        name: after[name] for name in ("correct", "total", "cut")
    }


def test_an_adapter_alone_says_the_same_as_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("task=perplexity", f"data={place / 'rows.jsonl'}")
    of_run, of_adapter = rows(capsys, place / "a", place / "a" / "adapter", *words)
    assert of_adapter["loss"] == of_run["loss"]
    assert of_adapter["difference"] == 0.0
    assert of_adapter["difference_interval"] == [0.0, 0.0]


def test_differences_are_those_of_the_items(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("task=perplexity", f"data={place / 'rows.jsonl'}", "--out", tmp_path / "out.json")
    base, trained = rows(capsys, place / "model", place / "a", *words)
    assert trained["loss"] < base["loss"]
    assert trained["difference"] == pytest.approx(trained["mean"] - base["mean"])
    low, high = trained["difference_interval"]
    assert low < trained["difference"] < high < 0
    kept = read(tmp_path / "out.json")
    assert [len(one["values"]) for one in kept["items"]] == [trained["items"]] * 2


def test_a_text_is_one_item_whose_bytes_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = rows(capsys, place / "model", "task=perplexity", f"data={place / 'text.txt'}", "eval.window=64")
    size = len((place / "text.txt").read_bytes())
    assert found["items"] == 1
    assert found["bits_per_byte"] * size * math.log(2) == pytest.approx(found["loss"] * found["tokens"], rel=1e-2)


def test_problems_of_a_file_are_answered_all_or_so_many(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"data={place / 'rows.jsonl'}"
    count = len((place / "rows.jsonl").read_text().splitlines())
    (found,) = rows(capsys, place / "a", "task=gsm8k", file, "eval.max_new_tokens=4")
    assert (found["total"], found["max_new_tokens"]) == (count, 4)
    (found,) = rows(capsys, place / "a", "task=gsm8k", file, "eval.size=3")
    assert found["total"] == 3


def test_the_table_names_every_subject(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, place / "a", place / "b", "task=perplexity", f"data={place / 'rows.jsonl'}")
    assert status == 0
    assert text.count("nats a token") == 2


@pytest.mark.slow
def test_several_differences_have_wider_intervals_and_it_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (place / "model", place / "a", place / "b", "task=perplexity", f"data={place / 'rows.jsonl'}")
    _, alone = rows(capsys, words[0], words[1], *words[3:])
    first, both, other = rows(capsys, *words)
    assert "comparisons" not in alone.keys() | first.keys()
    assert (both["comparisons"], other["comparisons"]) == (2, 2)
    wide, usual = (one["difference_interval"][1] - one["difference"] for one in (both, alone))
    assert wide / usual == pytest.approx(2.241403 / 1.959964, rel=1e-4)
    assert "corrected for 2 comparisons with the first (Bonferroni)" in said(capsys, *words)[1]
    assert "Bonferroni" not in said(capsys, words[0], words[1], *words[3:])[1]


def _other_base(place: Path, tmp_path: Path) -> list[Any]:
    other = make_workplace(tmp_path, hidden_size=64)
    return [place / "a" / "adapter", "--base", other / "model", "task=perplexity", f"data={place / 'text.txt'}"]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ([], 2, "Nothing is named that could be measured"),
        (["{place}/model"], 2, "Nothing says what is to be measured. Give task=<"),
        (["{place}/model", "task=gsm8l"], 2, "There is no task 'gsm8l'. Did you mean 'gsm8k'? Give one of: accuracy, "),
        (["{place}/model", "task=default"], 2, "There is no task 'default'. Give one of: accuracy, commonsense, "),
        (["{place}/model", "eval=default"], 2, "There is no task 'default'."),
        (["{place}/model", "task="], 2, "There is no task ''."),
        (["{place}/model", "task=accuracy", "data={place}/rows.jsonl"], 2,
         "task=accuracy asks what a causal language model (model.kind=causal) has no answer to. Give one of: "
         "commonsense, forgetting, glue, gsm8k, humaneval, match, mmlu, perplexity."),
        (["{place}/model", "task=perplexity", "data={place}/text.txt", "data.max_length=8"], 2,
         "data.max_length=8 cuts no text of task=perplexity, so it would change nothing"),
        (["{place}/model", "task=loss", "data={place}/rows.jsonl"], 2, "measures the training of a run alone"),
        (["{place}/model", "task=perplexity"], 2, "has no text of its own. Give data=<file>"),
        (["{place}/model", "task=perplexity", "optim.lr=1"], 2, "changes nothing that is measured"),
        (["{place}/a", "eval.size=3"], 2, "need its name. Give task=<name>"),
        (["{place}/model", "task=perplexity", "data={place}/none.txt"], 1, "cannot be read: No such file"),
        (["{place}/model", "task=perplexity", "data={place}/empty.txt"], 1, "is empty. Give a text"),
        (["{place}/model", "task=gsm8k", "data={place}/other.jsonl"], 1, "other.jsonl has the columns"),
        (["{place}/model", "task=gsm8k", "data={place}/words.jsonl"], 1, "words.jsonl, line 1: the answer does not"),
        (["{place}/model", "task=perplexity", "data={place}/text.txt", "eval.window=8", "eval.overlap=8"], 2,
         "leaves no token of a window of 8 to count"),
        (["{place}/a", "task=perplexity", "data={place}/text.txt", "model.dtype=bfloat16"], 2,
         "A run is loaded as it was trained, so 'model.dtype=bfloat16' would change nothing for {place}/a"),
        (["{place}/a", "task=perplexity", "data={place}/text.txt", "--base", "x/y"], 2,
         "--base x/y is the base model of an adapter, and '{place}/a' is a run"),
        (["{place}/a", "task=perplexity", "data={place}/rows.jsonl", "data.eval_size=2"], 2,
         "lorafa eval measures every row that data= gives"),
        (["{place}/model", "{place}/a"], 2, "is none. Put the run {place}/a first."),
        (["{place}/a", "--out", "{place}/rows.jsonl"], 2, "is there already, and nothing is overwritten"),
        (["{place}/a", "--out", "{place}/none/out.json"], 2, "lies in no folder that is there"),
        (["{place}/a", "{place}/nosuch"], 1, "There is no run, adapter or model '{place}/nosuch'"),
        (["{place}/nothing/there", "task=perplexity", "data={place}/text.txt"], 1, "No model"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_an_error(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    (place / "empty.txt").write_text(" \n")
    (place / "other.jsonl").write_text('{"a": "b"}\n')
    (place / "words.jsonl").write_text('{"question": "Who?", "answer": "Ann"}\n')
    found = said(capsys, *(word.format(place=place) for word in words))
    assert found[0] == status
    assert text.format(place=place) in found[1]


def test_an_adapter_of_another_base_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, text = said(capsys, *_other_base(place, tmp_path))
    assert status == 1
    assert "base" in text


def test_runs_of_other_data_are_not_compared_on_what_one_holds_out(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "rows.jsonl"
    other.write_text("\n".join((place / "rows.jsonl").read_text().splitlines()[:-1]))
    words = [word for word in settings(place, tmp_path / "c") if not word.startswith("data=")]
    assert main(["train", *words, f"data={other}", "train.checkpoint_every=0"]) == 0
    status, text = said(capsys, place / "a", tmp_path / "c")
    assert status == 1
    assert "were trained on other data" in text
    copy = tmp_path / "a"
    shutil.copytree(tmp_path / "c", copy)
    other.write_text((place / "rows.jsonl").read_text())
    status, text = said(capsys, copy)
    assert status == 1
    assert "does not give the samples that the run" in text


def test_every_row_of_a_local_copy_of_a_published_set_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / "sst.jsonl"
    copy.write_text("\n".join(json.dumps({"sentence": f"good {n}", "label": n % 2}) for n in range(12)))
    (found,) = rows(capsys, place / "model", "task=match", "data=sst2", f"data.file={copy}", "eval.max_new_tokens=2")
    assert found["total"] == 12


def test_a_model_is_asked_through_the_template_of_the_run_beside_it(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = settings(place, tmp_path / "plain")
    assert main(["train", *words, "data.template=plain", "train.checkpoint_every=0"]) == 0
    before = read(tmp_path / "plain" / "result.json")["before"]
    capsys.readouterr()
    _, base, *_ = rows(capsys, tmp_path / "plain", place / "model")
    assert base["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_a_file_is_given_the_table_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(place / "a"), "task=perplexity", f"data={place / 'text.txt'}"]) == 0
    captured = capsys.readouterr()
    bars = ("Loading", f"{place / 'a'}: perplexity", "0:00")
    assert [bar for bar in bars if bar in captured.out] == []
    assert f"{place / 'a'}: perplexity" in captured.err
    assert "bits_per_byte" in captured.out


def test_the_answers_to_all_items_are_kept_with_whether_they_are_right(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    count = len((place / "rows.jsonl").read_text().splitlines())
    for task in ("gsm8k", "match"):
        words = (f"task={task}", f"data={place / 'rows.jsonl'}", "eval.max_new_tokens=4")
        (found,) = rows(capsys, place / "a", *words, "--out", tmp_path / f"{task}.json")
        (kept,) = read(tmp_path / f"{task}.json")["items"]
        assert len(kept["answers"]) == found["total"] == count
        assert [float(one["correct"]) for one in kept["answers"]] == kept["values"]
    assert len(read(place / "a" / "result.json")["samples"]) <= 6


def _no_adapter(place: Path, tmp_path: Path) -> list[Path]:
    run = tmp_path / "run"
    shutil.copytree(place / "b", run)
    shutil.rmtree(run / "adapter")
    return [run]


def _of_another_base(place: Path, tmp_path: Path) -> list[Path]:
    other = make_workplace(tmp_path, hidden_size=64)
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "b" / "adapter", adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(read(file) | {"base_model_name_or_path": str(other / "model")}))
    return [adapter]


def _of_another_kind(place: Path, tmp_path: Path) -> list[Path]:
    return [make_bert(tmp_path, BertForSequenceClassification) / "model"]


@pytest.mark.parametrize(
    ("make", "status", "text"),
    [
        (_no_adapter, 2, "has no adapter yet"),
        (_of_another_base, 1, "adapter_model.safetensors"),
        (_of_another_kind, 2, "has no answer to. Give one of: accuracy."),
    ],
)
def test_what_is_wrong_with_the_last_is_said_before_the_first_is_measured(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, Path], list[Path]],
    status: int,
    text: str,
) -> None:
    measured = []
    usual = EVALS.get("perplexity")
    watched = replace(usual, measure=lambda *arguments: measured.append(1) or usual.measure(*arguments))
    words = ("task=watched", f"data={place / 'rows.jsonl'}")
    with EVALS.added("watched", watched):
        found = said(capsys, place / "a", place / "model", *make(place, tmp_path), *words)
    assert (found[0], text in found[1]) == (status, True)
    assert measured == []


def test_help_names_the_tasks_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", "--help"])
    assert left.value.code == 0
    assert "perplexity" in capsys.readouterr().out


def test_problems_are_asked_as_published_where_that_is_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["task=gsm8k", f"data={place / 'rows.jsonl'}", "eval.size=2", "eval.published=true"]
    rows(capsys, place / "model", *words, "--out", tmp_path / "out.json")
    (item,) = read(tmp_path / "out.json")["items"]
    first = json.loads((place / "rows.jsonl").read_text().splitlines()[0])
    assert item["answers"][0]["question"] == f"Q: {first['question']}\nA: "


def test_benchmarks_of_files_are_asked_and_paired(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [{"instruction": f"Is {n} even?", "answer": "true" if n % 2 == 0 else "false"} for n in range(4)]
    (place / "boolq.json").write_text(json.dumps(answers))
    (place / "sst2.jsonl").write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n')
    for words, items in (
        (("task=commonsense", "eval.task=boolq", f"data={place / 'boolq.json'}", "eval.max_new_tokens=4"), 4),
        (("task=glue", "eval.task=sst2", f"data={place / 'sst2.jsonl'}"), 2),
    ):
        base, trained = rows(capsys, place / "model", place / "a", *words)
        assert (base["items"], trained["total"], base["eval_task"]) == (items, items, words[1].partition("=")[2])
        assert trained["difference"] == pytest.approx(trained["accuracy"] - base["accuracy"])
        assert len(base["interval"]) == 2


def test_a_training_is_not_measured_by_a_benchmark_with_problems_of_its_own(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("humaneval", "mmlu", "commonsense", "glue"):
        words = [word for word in settings(place, tmp_path / name) if not word.startswith("eval.")]
        assert main(["train", *words, f"eval={name}"]) == 2
        text = " ".join(capsys.readouterr().err.split())
        assert f"measure afterwards: lorafa eval <run> task={name}" in text
