"""Runs on records as people have them: other files, several of them, plain texts, and tokens from the cache."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lorafa.cli.main import main
from lorafa.data.chat import Encoder
from toys.records import write_rows
from toys.workplace import ROWS, make_workplace, metrics, read, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def command(workplace: Path, run: Path, *more: str) -> list[str]:
    given = {text.partition("=")[0] for text in more} | {"train.steps", "train.checkpoint_every"}
    own = [text for text in settings(workplace, run) if text.partition("=")[0] not in given]
    short = ["train.steps=4", "train.checkpoint_every=2", "eval.before=false", "optim.schedule=constant"]
    return ["train", *own, *short, *more]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".json.gz"])
def test_the_same_rows_in_another_file_give_the_same_training(workplace: Path, tmp_path: Path, ending: str) -> None:
    assert main(command(workplace, tmp_path / "a")) == 0
    rows = write_rows(tmp_path / f"rows{ending}", ROWS)
    assert main(command(workplace, tmp_path / "b", f"data={rows}")) == 0
    first, second = (read(tmp_path / run / "result.json") for run in "ab")
    assert first["samples_sha256"] == second["samples_sha256"]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_run_from_the_cache_is_the_same_run_and_can_be_continued(
    workplace: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, tmp_path / "plain")) == 0
    assert not cache.exists()
    assert main(command(workplace, tmp_path / "first", "data.cache=true")) == 0
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "sample", None)
        assert main(command(workplace, tmp_path / "second", "data.cache=true")) == 0
        assert f"Their tokens were in the cache: {next(cache.iterdir())}" in capsys.readouterr().out
        assert main(["train", f"train.resume={tmp_path / 'second'}", "train.steps=5"]) == 0
    results = [read(tmp_path / run / "result.json") for run in ("plain", "first", "second")]
    assert results[0]["after"] == results[1]["after"]
    for name in ("samples_sha256", "rows"):
        assert results[0][name] == results[1][name] == results[2][name]
    assert losses(tmp_path / "plain") == losses(tmp_path / "first") == losses(tmp_path / "second")[:4]


def test_several_sources_are_mixed_by_weight_and_said(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_rows(tmp_path / "more.csv", [{"text": f"A text of the number {n}."} for n in range(8)])
    names = f"data=[{workplace / 'rows.jsonl'},{more}]"
    run = tmp_path / "run"
    assert main(command(workplace, run, names, "data.weights=[3,1]", "data.eval_size=7")) == 0
    result = read(run / "result.json")
    assert result["source"] == f"{workplace / 'rows.jsonl'} (15 of 20 rows) + {more} (5 of 8 rows)"
    assert (result["rows"]["train"], result["rows"]["heldout"]) == (20, 7)
    assert "20 samples to train on, 7 held out" in " ".join(capsys.readouterr().out.split())
    assert main(["train", f"train.resume={run}", "train.steps=5"]) == 0


def test_plain_texts_are_trained_and_measured(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": f"A text of the number {n}."} for n in range(20)])
    run = tmp_path / "run"
    assert main(command(workplace, run, f"data={rows}")) == 0
    result = read(run / "result.json")
    assert result["after"]["loss"] > 0
    assert "total" not in result["after"]
    assert main(command(workplace, tmp_path / "other", f"data={rows}", "data.template=plain")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "data.template=plain would change nothing: the records of" in said
    assert not (tmp_path / "other").exists()


def test_a_folder_is_one_source_and_its_bad_row_is_named_before_a_run_is_made(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": 5}\n'))
    assert main(command(workplace, tmp_path / "run", f"data={folder}")) == 1
    assert "b.jsonl.gz, line 2: column 'text' holds 5, expected text." in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "fine"}).encode()))
    assert main(command(workplace, tmp_path / "run", f"data={folder}")) == 0
    assert read(tmp_path / "run" / "result.json")["rows"]["train"] == 17
