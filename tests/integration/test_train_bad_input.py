"""Bad input to `lorafa train`, from the command line: one line that says what to do, and no directory left behind."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.runs.record import RunDirectory
from toys.workplace import ROWS, make_workplace, read, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture
def refused(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run with the given settings, expect a refusal without a traceback or a directory, and return its text."""

    def run(*overrides: str, status: int = 1) -> str:
        target = tmp_path / "run"
        assert main(["train", *settings(workplace, target), *overrides]) == status
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert "not foreseen" not in text
        assert not target.exists()
        return " ".join(text.split())

    return run


def resized(workplace: Path, folder: Path, **changes: Any) -> str:
    """The setting for a random model like the one of the workplace, with another config."""
    model = shutil.copytree(workplace / "model", folder / "resized")
    config = AutoConfig.from_pretrained(model)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    return f"model={model}"


def test_samples_longer_than_the_context_are_refused(
    refused: Callable[..., str], workplace: Path, tmp_path: Path
) -> None:
    model = resized(workplace, tmp_path, max_position_embeddings=20)
    text = refused(model, "eval.size=0")
    assert "are longer than the model's context of 20 tokens, the longest has" in text
    assert "Cut them: data.max_length=20." in text


def test_answers_that_would_not_fit_are_refused_before_anything_is_measured(refused: Callable[..., str]) -> None:
    assert "with max_new_tokens=1000 that exceeds the model's context of 256" in refused("eval.max_new_tokens=1000")


def test_a_tokenizer_of_another_model_is_refused(refused: Callable[..., str], workplace: Path, tmp_path: Path) -> None:
    text = refused(resized(workplace, tmp_path, vocab_size=20))
    assert "but the model's embedding has 20 rows. They do not belong together" in text


def test_brackets_in_names_are_no_markup(
    refused: Callable[..., str], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "No model '[/x]'" in refused("model=[/x]")
    rows = shutil.copy(workplace / "rows.jsonl", tmp_path / "[bold] rows.jsonl")
    run = tmp_path / "[/x] run"
    assert main(["train", *settings(workplace, run), f"data={rows}", "train.steps=1", "eval.size=0"]) == 0
    out = capsys.readouterr().out
    assert f"Run directory: {run}\n" in out
    assert "[bold] rows.jsonl" in " ".join(out.split())


@pytest.mark.parametrize(
    ("place", "why"), [("file", "is not a folder"), ("file/run", "is not a folder"), ("link", "is not a folder")]
)
def test_a_run_directory_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    refused: Callable[..., str], tmp_path: Path, place: str, why: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    text = refused(f"run_dir={tmp_path / place}", "model=no-such-model", status=2)
    assert f"cannot be made: '{tmp_path / place.partition('/')[0]}' {why}. Choose another run_dir." in text
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_in_a_folder_one_may_not_write_to_is_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    text = refused(f"run_dir={tmp_path / 'a' / 'b'}", "model=no-such-model", status=2)
    assert f"cannot be made: '{tmp_path}' cannot be written to. Choose another run_dir." in text


def test_a_dry_run_refuses_the_run_directory_the_run_would_refuse(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["train", *settings(workplace, tmp_path), "--dry-run"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_tokenizer_without_a_pad_or_an_end_token_trains(workplace: Path, tmp_path: Path) -> None:
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    file = model / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in values.items() if k not in ("eos_token", "pad_token")}))
    rows = [{**row, "answer": "so " * i + row["answer"]} for i, row in enumerate(ROWS)]  # batches need padding
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    changes = [f"model={model}", f"data={tmp_path / 'rows.jsonl'}", "train.steps=2", "data.max_length=100"]
    assert main(["train", *settings(workplace, run), *changes]) == 0
    assert read(run / "result.json")["status"] == "finished"


def test_a_warning_is_one_line_without_code(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
    assert main(["train", *settings(workplace, tmp_path / "run"), f"model={model}", "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert line.startswith("warning: The model has no place for 9 weights of the folder ")


@pytest.mark.parametrize("way", ["LORAFA_CACHE", "data.cache_dir", "a run to continue"])
def test_code_in_a_cache_that_others_made_does_not_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """Neither with --dry-run, nor where the record of a run names the cache."""
    wheel, ran = tmp_path / "reasoning-gym-0.1.25.whl", tmp_path / "ran"
    folder = "reasoning_gym/arithmetic/gsm_symbolic"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("reasoning_gym/utils.py", f"open({str(ran)!r}, 'w')")
        archive.writestr(f"{folder}/gsm_symbolic.py", "tasks_ok = []")
        for part in ("00_49", "50_99"):
            archive.writestr(f"{folder}/generators_{part}.py", "")
    arguments = [f"model={workplace / 'model'}"]
    if way == "LORAFA_CACHE":
        monkeypatch.setenv(way, str(tmp_path))
    else:
        arguments.append(f"data.cache_dir={tmp_path}")
    if way == "a run to continue":
        run = RunDirectory.create(tmp_path / "run", compose(arguments))
        checkpoint = run.checkpoints / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text("{}")
        arguments = [f"train.resume={run.path}"]
    for more in (["--dry-run"], []):
        assert main(["train", *arguments, *more]) == 1
        err = " ".join(capsys.readouterr().err.split())
        assert f"The cached {wheel} is not the wheel that was published" in err
        assert "Delete it and run again" in err
        assert not ran.exists()


def test_a_pad_token_without_a_row_of_the_embedding_trains(workplace: Path, tmp_path: Path) -> None:
    """It was added to the tokenizer and not to the model; rows differ in length, so that there is padding."""
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id == AutoConfig.from_pretrained(model).vocab_size
    rows = [{**row, "question": "so " * i + row["question"]} for i, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    changes = [f"model={model}", f"data={tmp_path / 'rows.jsonl'}", "train.steps=2"]
    assert main(["train", *settings(workplace, run), *changes]) == 0
    assert read(run / "result.json")["after"]["total"] == 4
