"""Where the rows of published data sets come from, which are held out, and what is said where something is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafa.conf.compose import compose
from lorafa.data import DATASETS, data_set_names
from lorafa.data.entry import Wanted
from lorafa.data.sets.published import Drawn, InOrder, OtherSplit, PublishedSettings
from lorafa.errors import ConfigError, DataError, SourceError
from toys.places import ROOT
from toys.published import PLACES, ROWS, SPLITS, Hub, load, numbered, published, texts, write


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_that_the_authors_evaluate_on_is_held_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_id, subset, split = PLACES[name]
    hub = Hub(monkeypatch, train=numbered(name, range(10)), **{str(split): numbered(name, range(20, 24))})
    for seed in (0, 1):
        found = load(name, eval_size=None, seed=seed)
        assert (len(found.train), len(found.heldout)) == (10, 4)
        assert "20" in texts(found.heldout[0])[0]
        assert "0" in texts(found.train[0])[0]
    assert [asked[2] for asked in hub.asked] == ["train", split] * 2
    title = hub_id if subset is None else f"{hub_id} ({subset})"
    assert found.source == f"{title}, held out {split}"


def test_the_first_so_many_rows_of_the_split_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, train=numbered("sst2", range(10)), validation=numbered("sst2", range(20, 24)))
    of_all = load("sst2", eval_size=None)
    assert load("sst2", eval_size=3).heldout == of_all.heldout[:3]
    assert load("sst2", eval_size=0.5).heldout == of_all.heldout[:2]
    assert load("sst2", eval_size=3, train_size=2).train == of_all.train[:2]
    none = load("sst2", eval_size=0)
    assert (none.heldout, none.source) == ([], "nyu-mll/glue (sst2)")
    with pytest.raises(DataError, match=r"\(sst2\) holds 4 rows in the split validation, which is held out, asked fo"):
        load("sst2", eval_size=5)
    with pytest.raises(DataError, match=r"holds 14 rows \(0 of them .*\), asked for 4 to evaluate and 11 to train on"):
        load("sst2", eval_size=4, train_size=11)


def test_a_row_that_asks_what_a_held_out_row_asks_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, train=numbered("rte", range(4)), validation=numbered("rte", range(3, 5)))
    found = load("rte", eval_size=None)
    assert (len(found.train), found.repeated) == (3, 1)


def test_of_a_local_file_rows_are_held_out_as_of_any_other_file(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", numbered("gsm8k", range(40)))
    found = load("gsm8k", eval_size=None, file=file)
    assert (len(found.train), len(found.heldout)) == (36, 4)
    assert load("gsm8k", eval_size=None, file=file, seed=1).heldout != found.heldout
    assert load("gsm8k", eval_size=None, file=file, train_size=5).heldout == found.heldout


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_held_out_rows_is_written_as_the_others_are(name: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", numbered(name, range(3)))
    test = write(tmp_path / "test.csv", [ROWS[name][0]])
    found = load(name, eval_size=None, file=train, eval_file=test, train_size=2)
    assert [texts(record) for record in found.heldout] == [ROWS[name][1:]]
    assert len(found.train) == 2
    assert found.source == f"{train}, held out {test}"


def test_a_file_of_held_out_rows_with_other_columns_is_read_as_every_file_is(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [ROWS["meta_math"][0]])
    test = write(tmp_path / "test.jsonl", [{"prompt": "Say 1.", "completion": "1"}])
    found = load("meta_math", eval_size=None, file=train, eval_file=test)
    assert texts(found.heldout[0]) == ("Say 1.", "1")


@pytest.mark.parametrize(("name", "usual"), [("alpaca", 100), ("alpaca_gpt4", 100), ("commonsense_reasoning", 100)])
def test_where_the_authors_draw_a_number_of_rows_the_seed_draws_them(name: str, usual: int, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", numbered(name, range(1000)))
    found = load(name, eval_size=None, file=file)
    assert (len(found.train), len(found.heldout)) == (1000 - usual, usual)
    assert load(name, eval_size=None, file=file, seed=1).heldout != found.heldout
    assert len(load(name, eval_size=7, file=file).heldout) == 7


def test_commonsense_holds_out_no_more_than_120_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", numbered("commonsense_reasoning", range(1300)))
    assert len(load("commonsense_reasoning", eval_size=None, file=file).heldout) == 120


@pytest.mark.parametrize(
    ("name", "division"),
    [
        ("codefeedback", InOrder(100_000, 10_000)), ("wizard_lm", InOrder(52_000, 18_000)),
        ("meta_math_full", InOrder(394_000, 1_000)), ("flan", InOrder(100_000, 10_000)),
        ("flan_v2", InOrder(100_000, 10_000)), ("alpaca", Drawn(0.1)), ("commonsense_reasoning", Drawn(120)),
        ("mnli", OtherSplit("validation_matched")),
    ],
)  # fmt: skip
def test_the_numbers_of_rows_are_the_published_ones(name: str, division: Any) -> None:
    assert published(name).heldout == division


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (7, 1), (35, 9), (70, 18), (700, 180)])
def test_of_fewer_rows_than_published_the_same_share_is_held_out(count: int, held: int, tmp_path: Path) -> None:
    file = write(tmp_path / "w.jsonl", numbered("wizard_lm", range(count)))
    found = load("wizard_lm", eval_size=None, file=file)
    assert (len(found.train), len(found.heldout)) == (count - held, held)


def test_of_what_is_streamed_no_more_rows_are_fetched_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, train=numbered("flan", range(100)))
    short = replace(published("flan"), heldout=InOrder(trained=10, heldout=2))
    found = short.load(Wanted("flan", None, None, 0), PublishedSettings())
    assert (len(found.train), len(found.heldout), hub.read) == (10, 2, 12)
    found = short.load(Wanted("flan", 3, 5, 0), PublishedSettings())
    assert (len(found.train), len(found.heldout), hub.read) == (3, 5, 12 + 15)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_without_the_hub_the_error_names_both_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    hub_id, subset, _ = PLACES[name]
    title = rf"{hub_id} \({subset}\)" if subset else hub_id
    both = rf"Could not load {title} from the Hub: no route\. Next step: check the connection, or give a local copy"
    with pytest.raises(SourceError, match=rf"^{both}, data\.file=<[\w.-]+> with the columns [\w, ]+\.$"):
        load(name)


def test_a_stream_that_breaks_off_is_an_error_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def broken(*_: Any, **__: Any) -> Any:
        yield ROWS["flan_v2"][0]
        raise TimeoutError("took too long")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(SourceError, match=r"Could not load SirNeural/flan_v2 from the Hub: took too long\. Next step"):
        load("flan_v2")


def test_a_hub_that_is_switched_off_is_named_by_the_library_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"Could not load openai/gsm8k \(main\) from the Hub: .*data\.file=<train\."):
        load("gsm8k")


@pytest.mark.parametrize("name", ROWS)
def test_other_columns_are_refused_with_those_that_are_there(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "copy.jsonl", [{"foo": "a", "type": "GSM"}])
    with pytest.raises(DataError, match=r"copy\.jsonl has no column '\w+'\. Its columns are: foo, type\. Give a copy"):
        load(name, file=file)


def test_mistakes_in_files_are_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.file=nowhere\.jsonl is no file\. Give a copy of train\.jsonl, or le"):
        load("gsm8k", file="nowhere.jsonl")
    rows = [ROWS["sst2"][0], {"sentence": "x"}]
    with pytest.raises(DataError, match=r"line 2: no column 'label'; this row has sentence\. Give every row the same"):
        load("sst2", file=write(tmp_path / "copy.jsonl", rows))
    with pytest.raises(DataError, match=r"line 1: column 'question2' holds 7, expected text"):
        load("qqp", file=write(tmp_path / "copy.jsonl", [{"question1": "a", "question2": 7, "label": 0}]))
    with pytest.raises(DataError, match=r"line 1: column 'answers' holds \['Ann'\], expected \{'text': \[\.\.\.\]\}"):
        load("squad", file=write(tmp_path / "copy.jsonl", [ROWS["squad"][0] | {"answers": ["Ann"]}]))
    with pytest.raises(DataError, match=r"copy\.jsonl holds no rows that can be trained on\. Give a copy of sst2\.js"):
        load("sst2", file=write(tmp_path / "copy.jsonl", []))
    with pytest.raises(ConfigError, match=r"data=sst2 has no setting 'split' .* It has: file, revision"):
        load("sst2", split="train")


def test_the_runner_takes_every_name_and_its_file() -> None:
    for name in ROWS:
        data = compose([f"data={name}", "data.file=~/a copy (1).json"]).data
        assert (data.name, data.own.file, data.own.revision) == (name, "~/a copy (1).json", None)


# ---- the page -------------------------------------------------------------------------------------------------------

HELD: dict[type[Any], Callable[[Any], str]] = {
    OtherSplit: lambda division: f"`{division.name}`",
    InOrder: lambda division: f"{division.heldout:,} after the first {division.trained:,}",
    Drawn: lambda division: "a tenth, drawn" if division.size == 0.1 else f"{division.size}, drawn",
}
"""How the page says which rows are held out."""


def test_the_page_lists_every_published_data_set_with_where_its_rows_are_and_which_are_held_out() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("### Published data sets")[2]
    lines = [line.strip("| ").split(" | ") for line in page.partition("\n### ")[0].splitlines() if line[:3] == "| `"]
    said = {cells[0].strip("`"): (cells[1], cells[-1].removesuffix(" *")) for cells in lines[1:]}
    entries = {name: published(name) for name in data_set_names() if DATASETS.get(name).hub is not None}
    assert list(said) == list(entries)
    assert said == {
        name: (
            f"`{entry.hub}`" + (f", `{entry.subset}`" if entry.subset else ""),
            HELD[type(entry.heldout)](entry.heldout),
        )
        for name, entry in entries.items()
    }
    for cells in lines[1:]:
        quoted = re.findall("`([^`]+)`", cells[3])
        assert ROWS[cells[0].strip("`")][2] in quoted or len(quoted) < 2


def test_every_file_of_the_folder_is_a_data_set_or_what_they_share() -> None:
    files = {path.stem for path in (ROOT / "src" / "lorafa" / "data" / "sets").glob("*.py")}
    assert files == {"__init__", "published", "prompts", "problems", *data_set_names()}
